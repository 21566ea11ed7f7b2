"""The polar factor of the spectral rule with fewer products: the iteration on the short side of the matrix.

Every step of the Newton-Schulz iteration is X <- p(X X^T) X, a polynomial of the square matrix G = X X^T. The
polynomials commute, so that G <- p(G) G p(G) gives the next one's argument without X, and X itself is needed
twice: for the first G, and for the product with all polynomials at the end. For a matrix of a x ra these are
(4 r + 34) a^3 multiplications and additions against (20 r + 10) a^3: 0.56 as many at r = 4 (the matrices of
an MLP), 0.66 at r = 3 (query, key and value in one), more at r = 1.

In float32 the two differ by the rounding of G, whose small eigenvalues are squares: 1e-6 on noise, 2e-4 on a
matrix with singular values over six orders of magnitude (tests/step/kernels/test_polar.py). That grows by
twelve in every iteration, so it is not a way for half precision, nor for many iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia.update_rule import NEWTON_SCHULZ, polar, unit_largest

__all__ = ["polar_of"]

_LONG = 1.5  # sides' ratio from which this way has fewer operations


def polar_of(x: Tensor) -> Tensor:
    """``update_rule.polar(x)`` up to rounding: x is (a, b), float32 or float64."""
    if max(x.shape) < _LONG * min(x.shape) or torch.finfo(x.dtype).bits < 32:
        return polar(x)
    a, b, c = NEWTON_SCHULZ
    turned = x.size(0) > x.size(1)
    x = x.T if turned else x
    x = unit_largest(x)
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    gram = x @ x.T
    product = _polynomial(gram, a, b, c)
    last = product
    for _ in range(4):
        gram = last @ gram @ last
        last = _polynomial(gram, a, b, c)
        product = last @ product
    x = product @ x
    return x.T if turned else x


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """``a + b G + c G^2``."""
    value = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    value.diagonal().add_(a)
    return value
