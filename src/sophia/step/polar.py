"""The polar factor of the matrix rules with fewer and cheaper products: on the short side of the matrix, and
in bfloat16 where the machine multiplies that faster than float32.

Every iteration is X <- p(X X^T) X, a polynomial of the square matrix G = X X^T. The polynomials commute, so
that G <- p(G) G p(G) gives the next one's argument without X, and X itself is needed twice: for the first G,
and for the product with the polynomials at the end. With two iterations at a time, of a x ra, the four take
(8 r + 20) a^3 multiplications and additions where (16 r + 8) a^3 would be: 0.72 at r = 4 (the matrices of an
MLP), 0.79 at r = 3 (query, key and value in one), more at r = 1.

Not four at a time: what is small in X is its square in G, below G's rounding in bfloat16, which grows by up
to seventy in an iteration. With X itself in between, small singular values come out as from float32
(tests/step/test_polar.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sophia.update_rule import POLAR, short_side_first, unit_largest

__all__ = ["iterated", "multiplies_bfloat16", "polar_of"]

_LONG = 1.5  # sides' ratio from which this way has fewer operations


def polar_of(x: Tensor) -> Tensor:
    """``update_rule.polar(x)`` up to rounding: x is (a, b); the result has its dtype."""
    y = short_side_first(unit_largest(x))
    y = y.bfloat16() if x.dtype != torch.float64 and multiplies_bfloat16(x.device) else y
    found = iterated(y).to(x.dtype)
    return found if found.shape == x.shape else found.T


def iterated(y: Tensor) -> Tensor:
    """The polar factors of y, (a, b) or (n, a, b) with a not above b, in its dtype; zeros stay zeros.

    In bfloat16 the squares of y and their sums must be well within its range.
    """
    together = 2 if y.size(-1) >= _LONG * y.size(-2) else 1
    for first in range(0, len(POLAR), together):
        y = _iterations(y, POLAR[first : first + together], scaled=first == 0)
    return y


def _iterations(y: Tensor, iterations: Sequence[tuple[float, float, float]], *, scaled: bool) -> Tensor:
    # One by one: in a batched product a transposed side is copied, at twice to four times the cost.
    gram, scale = (y @ y.T if y.ndim == 2 else torch.stack([x @ x.T for x in y])), None
    if scaled:
        wide = torch.promote_types(gram.dtype, torch.float32)
        size = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=wide).clamp(min=1e-30)
        gram, scale = gram * (1 / size).to(y.dtype), (1 / size.sqrt()).to(y.dtype)
    last = product = _polynomial(gram, *iterations[0])
    for coefficients in iterations[1:]:
        gram = last @ gram @ last
        last = _polynomial(gram, *coefficients)
        product = last @ product
    return product @ y if scale is None else (product * scale) @ y


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """``a + b G + c G^2``."""
    times = torch.addmm if gram.ndim == 2 else torch.baddbmm
    value = times(gram, gram, gram, beta=b, alpha=c)
    value.diagonal(dim1=-2, dim2=-1).add_(a)
    return value


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked)
