"""Stochastic rounding to bfloat16, with noise that is a function of what is rounded and when.

A bfloat16 number has 8 significant bits: an average with decay 0.99 that is rounded to nearest ignores every
new value that lies within 20 to 40% of it, and drifts off. Rounded up with a probability equal to
the part that is cut off, each store is right in the mean:

    x in [a, b], neighbours:   P(b) = (x - a) / (b - a),   so   E = x.

In bits: add 16 uniform bits to the 32 of a float32, and cut the lower half off. That is exact, because
between two neighbours equal differences of bit patterns are equal differences of numbers.

The noise of an element is a hash of (key, element), and the key one of (seed, step, purpose, parameter):
nothing has to be saved for an exact resume, replicas agree, and the shards of a parameter draw what the whole
would. An element is numbered by its place in memory. The compiled kernel (``kernels/fused_cpu.c``) has the
same hash, so all paths draw the same.

The hash is the finaliser of MurmurHash3 (Austin Appleby, public domain) with half of the key added before and
half of it mixed in between its two multiplications.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sophia.step.flat_views import flat, is_dense

__all__ = ["key_of_parameter", "moved", "noise", "store"]

_WORD = 0xFFFFFFFF
_SPREAD = 0x9E3779B97F4A7C15  # odd, and both of its halves look random


def key_of_parameter(key: int, index: int) -> int:
    """The key of parameter number ``index`` under the key of a step and a purpose; 64 bits."""
    return (key + index * _SPREAD) & (_WORD << 32 | _WORD)


def moved(key: int, elements: int) -> int:
    """The key under which element 0 gets the noise that number ``elements`` gets under ``key``."""
    return (key & _WORD << 32) | (key + elements & _WORD)


def noise(key: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each of ``count`` elements, int32. Elements 2**32 apart get the same.

    >>> bool((noise(moved(7, 2), 3) == noise(7, 5)[2:]).all())
    True
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
    """Write ``value`` into ``target``: stochastically rounded if there is a key and the target is bfloat16,
    else to nearest.

    Args:
        target: plain tensor.
        value: of the same shape.
        key: see ``key_of_parameter``; None to round to nearest.
        upper: take the upper half of the noise, where two numbers are stored for one element.
    """
    if key is None or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    in_order = is_dense(target)
    if in_order and value.stride() != target.stride():
        value = torch.empty_like(target, dtype=torch.float32).copy_(value)
    value = value.to(torch.float32)
    elements = flat(value) if in_order else value.reshape(-1)
    bits = noise(key, elements.numel(), device=elements.device)
    bits = _shifted(bits, 16) if upper else bits.bitwise_and_(0xFFFF)
    bits += elements.view(torch.int32)
    bits &= ~0xFFFF
    # What is left fits, so that the copy changes nothing more. NaN is left as it is: carried over, its bits
    # could become a number.
    rounded = torch.where(elements.isnan(), elements, bits.view(torch.float32))
    if in_order:
        flat(target).copy_(rounded)
    else:
        target.copy_(rounded.view(target.shape))


def _signed(word: int) -> int:
    """The lower 32 bits as torch's int32 has them."""
    word &= _WORD
    return word - 2**32 if word >> 31 else word


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` of unsigned numbers: torch's own copies the sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)


@lru_cache(maxsize=1)
def _counted(count: int, device: str) -> Tensor:
    # The blocks of a walk over a large tensor have one length. Made in 64 bits: it may pass 2**31.
    return torch.arange(count, device=device).to(torch.int32)
