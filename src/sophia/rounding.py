"""Stochastic rounding to bfloat16, with noise that is a function of what is rounded and when.

A bfloat16 number has 8 significant bits: an average with decay 0.99, rounded to nearest, ignores every new
value that lies within 20 to 40% of it, and then it is no average. Rounded up with a probability equal to the
part that is cut off, each store is right in the mean:

    x in [a, b], neighbours:   P(b) = (x - a) / (b - a),   so   E = x.

In bits: add 16 uniform bits to the 32 of a float32, and cut the lower half off. That is exact, because within
a binade (and across its end) equal differences of bit patterns are equal differences of numbers.

The noise of an element is a hash of (key, element), and the key one of (seed, step, purpose, parameter):
nothing has to be saved for an exact resume, replicas agree, and the shards of a parameter draw what the whole
would. The compiled kernel (``kernels/fused_cpu.c``) has the same hash, so all paths store the same bits.

The hash is the finaliser of MurmurHash3 (Austin Appleby, public domain) with half of the key added before and
half of it mixed in between its two multiplications.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["key_of_parameter", "noise", "store"]

_WORD = 0xFFFFFFFF
_SPREAD = 0x9E3779B97F4A7C15  # odd, and no small multiple of it is near a multiple of 2**32


def key_of_parameter(key: int, index: int, first: int = 0) -> int:
    """The key of parameter number ``index`` under the key of a step; 64 bits.

    Args:
        key: of the step and the purpose, see ``sophia.noise.seed_for``.
        index: number of the parameter in the optimizer.
        first: where in the whole parameter the part begins whose elements are counted from 0.
    """
    mixed = key + index * _SPREAD
    return (mixed & _WORD << 32) | (mixed + first & _WORD)


def noise(key: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each of ``count`` elements, int32. Elements 2**32 apart get the same.

    >>> noise(7, 3), noise(8, 2)                # the lower word of the key moves along the elements
    (tensor([  843094083, -1061104064,  1284346203], dtype=torch.int32), tensor([-1061104064, 1284346203], ...
    """
    low, high = _signed(key), _signed(key >> 32)
    x = _counted(count, str(device)).add(low)
    x ^= _shifted(x, 16)
    x *= _signed(0x85EBCA6B)
    x ^= high
    x ^= _shifted(x, 13)
    x *= _signed(0xC2B2AE35)
    x ^= _shifted(x, 16)
    return x


def store(target: Tensor, value: Tensor, key: int | None, *, upper: bool = False) -> None:
    """Write ``value`` into ``target``: rounded stochastically if there is a key and the target is bfloat16,
    else to nearest.

    Args:
        target: plain tensor, filled in the order of its memory.
        value: float32, of the same shape and strides.
        key: see ``key_of_parameter``; None to round to nearest.
        upper: take the upper half of the noise, where two numbers are stored for one element.
    """
    if key is None or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    assert value.dtype == torch.float32, value.dtype
    flat = value.as_strided((value.numel(),), (1,))
    added = noise(key, flat.numel(), device=flat.device)
    added = _shifted(added, 16) if upper else added.bitwise_and_(0xFFFF)
    added += flat.view(torch.int32)
    added &= ~0xFFFF
    # What is left fits: the conversion to bfloat16 changes nothing more. NaN has no place to be rounded to.
    rounded = torch.where(flat.isnan(), flat, added.view(torch.float32))
    target.as_strided((target.numel(),), (1,)).copy_(rounded)


def _signed(word: int) -> int:
    """The lower 32 bits as torch's int32 shows them."""
    word &= _WORD
    return word - 2**32 if word >> 31 else word


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` of unsigned numbers: torch's own copies the sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)


@lru_cache(maxsize=4)
def _counted(count: int, device: str) -> Tensor:
    # The blocks of a walk over a large tensor have one length.
    return torch.arange(count, dtype=torch.int64, device=device).to(torch.int32)
