"""Convex functions whose curvature, minimum and smoothness radius are known, at any condition number.

    L(theta) = sum_i lambda_i phi(x_i),   x = Q^T theta,   phi(0) = phi'(0) = 0,  phi''(0) = 1,  phi'' <= 1

Its minimum is 0 at 0, its Hessian Q diag(lambda_i phi''(x_i)) Q^T, and mu, the smallest eigenvalue at the
minimum, the smallest lambda. Assumption 4.2 of arXiv 2305.14342v4 asks for a radius R such that
``|a - b| <= R`` implies ``|| H(b)^-1 H(a) || <= 2``: the functions below have one that does not depend on the
lambdas, and it is given in closed form. With Q a Kronecker product, theta is a matrix W and x is ``A' W B``
(``kronecker``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RADIUS", "Valley", "kronecker", "rotation", "shares", "spectrum"]

RADIUS: dict[str, float] = {
    # phi'' = sech^2, and cosh(b) / cosh(a) <= exp |a - b|
    "log cosh": math.log(2) / 2,
    # phi'' = (1 + x^2)^(-3/2), and sqrt((1 + b^2) / (1 + a^2)) <= t where t - 1/t = |a - b|; t^3 = 2
    "pseudo-Huber": 2 ** (1 / 3) - 2 ** (-1 / 3),
}
"""R of Assumption 4.2, by the name of phi; a quadratic's is as large as one likes."""


@dataclass(frozen=True)
class Valley:
    """One such function; all points are float64 ``(..., d)``."""

    phi: str
    """"log cosh", "pseudo-Huber" or "quadratic"."""
    eigenvalues: Tensor
    """lambda, (d,)."""
    basis: Tensor
    """Q, (d, d), orthogonal; its columns are the eigenvectors."""

    def loss(self, theta: Tensor) -> Tensor:
        """L, (...,)."""
        x = theta @ self.basis
        if self.phi == "log cosh":
            # Not by |x|: automatic differentiation would give no curvature at 0, where many starts lie.
            value = torch.logaddexp(x, -x) - math.log(2)
        elif self.phi == "quadratic":
            value = x**2 / 2
        else:
            value = x**2 / (1 + torch.sqrt(1 + x**2))
        return (self.eigenvalues * value).sum(-1)

    def gradient(self, theta: Tensor) -> Tensor:
        """Its gradient, (..., d)."""
        x = theta @ self.basis
        if self.phi == "quadratic":
            slope = x
        else:
            slope = torch.tanh(x) if self.phi == "log cosh" else x / torch.sqrt(1 + x**2)
        return (self.eigenvalues * slope) @ self.basis.T

    def hessian(self, theta: Tensor) -> Tensor:
        """Its Hessian, (..., d, d)."""
        x = theta @ self.basis
        if self.phi == "quadratic":
            second = torch.ones_like(x)
        else:
            second = torch.cosh(x) ** -2 if self.phi == "log cosh" else (1 + x**2) ** -1.5
        return (self.basis * (self.eigenvalues * second)[..., None, :]) @ self.basis.T

    def start(self, parts: Tensor, gap: float) -> Tensor:
        """The points whose loss is ``gap``, of which the i-th eigendirection has the share ``parts[..., i]``.

        A start that is fixed instead would have a larger gap at a larger condition number, and the theorem
        has the gap over mu in its bound.
        """
        part = parts * gap / self.eigenvalues
        if self.phi == "log cosh":
            above = torch.expm1(part)  # cosh x - 1
            x = torch.log1p(above + torch.sqrt(above * (above + 2)))
        elif self.phi == "quadratic":
            x = torch.sqrt(2 * part)
        else:
            x = torch.sqrt(part * (part + 2))
        return x @ self.basis.T

    def noise(self, shape: tuple[int, ...], predictions: int, generator: torch.Generator) -> Tensor:
        """Gradient noise with the covariance ``H(0) / predictions``: that of a maximum-likelihood loss over
        so many predictions, at its minimum.
        """
        z = torch.randn(*shape, len(self.eigenvalues), dtype=torch.float64, generator=generator)
        return (z * (self.eigenvalues / predictions).sqrt()) @ self.basis.T


def spectrum(d: int, kappa: float) -> Tensor:
    """Eigenvalues from 1 to the condition number, (d,), evenly spread in the logarithm."""
    return torch.logspace(0, math.log10(kappa), d, dtype=torch.float64)


def kronecker(phi: str, kappa: float, rows: Tensor, columns: Tensor) -> Valley:
    """A function of a matrix W (a, b), flattened row by row: ``L = sum_ij lambda_ij phi(x_ij)``, x = A' W B.

    ``rows`` is A (a, a), ``columns`` B (b, b), both orthogonal. lambda_ij is a product of an eigenvalue for
    each side, both up to the root of the condition number, so at the minimum the Hessian is a Kronecker
    product, ``A diag(.) A' (x) B diag(.) B'``.
    """
    sides = [spectrum(len(side), math.sqrt(kappa)) for side in (rows, columns)]
    return Valley(phi, torch.kron(*sides), torch.kron(rows.contiguous(), columns.contiguous()))


def rotation(d: int, seed: int, angle: float | None = None) -> Tensor:
    """A random rotation: uniform over all of them, or with ``angle`` one whose largest angle, in radians,
    this is.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(d, d, dtype=torch.float64, generator=generator)
    if angle is None:
        q, r = torch.linalg.qr(draw)
        uniform: Tensor = q * r.diagonal().sign()
        return uniform
    skew = draw - draw.T
    turned: Tensor = torch.linalg.matrix_exp(angle * skew / torch.linalg.matrix_norm(skew, 2))
    return turned


def shares(d: int, random: int = 5) -> Tensor:
    """How the gap is spread at the starts, (random + 3, d): evenly, all in the flattest direction, all in the
    sharpest, and at random.
    """
    generator = torch.Generator().manual_seed(7)
    draw = -torch.log(torch.rand(random, d, dtype=torch.float64, generator=generator))
    fixed = torch.stack([torch.full((d,), 1 / d), torch.eye(d)[0], torch.eye(d)[-1]]).double()
    return torch.cat([fixed, draw / draw.sum(-1, keepdim=True)])
