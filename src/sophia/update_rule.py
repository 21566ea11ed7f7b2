"""The Sophia update: the whole algorithm as four pure functions of tensors.

    m     <- beta1 m + (1 - beta1) g                       every step
    h     <- beta2 h + (1 - beta2) h_hat                   every k-th step, before the step is taken
    theta <- theta - lr wd theta                           decoupled weight decay, never clipped
    theta <- theta - lr clip(m / max(gamma h, eps), 1)     element by element, |each entry| <= 1

g is the gradient of the loss, h_hat an estimate of the diagonal of its curvature (``sophia.curvature``).
One coordinate therefore never moves by more than lr, and where h is zero, negative or tiny the step is
lr * sign(m): momentum sign descent is the built-in fall-back.

Source: Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv 2305.14342v4, Algorithm 3. As in the paper, neither m nor h is bias-corrected.

The same thing under its four names::

    here       paper v4           paper v1                  official repository
    ---------  -----------------  ------------------------  --------------------------------------------
    theta      theta              theta                     param
    m          m                  m                         exp_avg
    h          h                  h                         B * hessian     (its buffer lacks the factor B)
    gamma      gamma              rho                       rho             (.05 for GPT-2 125M, Sophia-G)
    lr         eta                rho * eta                 lr
    eps        eps inside max     rho * eps inside max      + 1e-15, added to the denominator
    beta1      beta_1             beta_1                    betas[0]
    beta2      beta_2             beta_2                    betas[1]
    wd         lambda             lambda                    weight_decay
    k          k                  k                         the interval in its training script
    B          B                  B (sequences)             bs, an argument of step()

v1 wrote eta clip(m / max(h, eps), rho) = (eta rho) clip(m / max(rho h, rho eps), 1): its step size times its
rho is our lr, its rho is our gamma. B is the number of predictions (tokens) averaged in the loss; h is stored
already multiplied by it, so that gamma means the same at every batch size and there is no ``bs`` here.

Three rules of our own stand beside the published one (``rule=`` of ``Sophia``; what they gain is measured in
``docs/research.md``). With u = beta1 m + (1 - beta1) g, Nesterov's look-ahead, and m and h corrected for
their start at zero, the one with curvature::

    damped     theta <- theta - lr s clip(u / max(gamma h, damping r, eps), 1)

r is the rms of the tensor's u in the step before, as that of the same step would take one more pass over
memory. A coordinate whose momentum is far below it is moved by little, as a rare token's embedding should be
between two of its occurrences; by the published rule it goes on at full lr, in a direction long out of date,
until m has decayed below gamma h. s is a number for the kind of tensor.

The others divide by second moments of the gradients themselves, and nothing is ever refreshed: for hidden
matrices (spectral, whitened), and for other matrices (factored), written for one whose short side are rows::

    spectral   theta <- theta - lr s D / rms(D), D = R^-1/4 polar(R^-1/4 u C^-1/4) C^-1/4
    whitened   theta <- theta - lr s D / rms(D), D = P polar(P u C) C, P = Q (q / mean + damping)^-1/8 Q'
    factored   theta <- theta - lr s P m C, P = Q (v / mean + damping)^-1/2 Q', C = r^-1/2

The clip of Algorithm 3 bounds every entry of a step by 1, polar() every singular value, so that directions
which many coordinates share are bounded too. R and C are the mean squares of u over columns and rows, over
their mean. Q are the eigenvectors of M, the average of g g', a matrix of the short side's length, and q is
the diagonal of Q' M Q. v is the average of the diagonals of Q' g g' Q, each with the Q of its own step:
eigenvalues of the gradients that M is made of are too far apart, and the smallest, which move most in the
power of a half, too small. Beside P, C is a scale for each place on the long side: the mean squares of this
step's u there, over their mean, to the power -1/8, or r, the average of the mean squares of g. So these are
one second moment, factored: Shampoo's on the short side (Gupta et al., 1802.09568) or SOAP's (Vyas et al.,
2409.11321), and Adafactor's on the long one (Shazeer and Stern, 1804.04235). Vectors are moved by Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "POLAR",
    "along",
    "average_curvature",
    "average_gradient",
    "clipped_direction",
    "corrected_gamma",
    "damped_direction",
    "eigenbasis",
    "factored_direction",
    "inverse_power",
    "look_ahead",
    "polar",
    "relative",
    "rms",
    "second_moment",
    "short_side_first",
    "sophia_step",
    "spectral_direction",
    "started",
    "unit_largest",
    "usual_size",
    "whitened_direction",
]

POLAR = (
    (8.1360, -23.0215, 16.3850),
    (3.8384, -2.7527, 0.5065),
    (3.1124, -2.2431, 0.4509),
    (2.1895, -1.5672, 0.4079),
)
"""a, b, c of ``X <- (a + b X X^T + c (X X^T)^2) X`` in each iteration: after the four, singular values
between 0.005 and 1 are within 0.1 of 1. Each is the quintic nearest to 1 on what the last one leaves, as in
Polar Express (2505.16932), of an X smaller by a fiftieth: rounding puts some beyond the largest.
"""


def average_gradient(m: Tensor, g: Tensor, *, beta1: float) -> Tensor:
    """Return the new momentum ``beta1 m + (1 - beta1) g`` (Algorithm 3)."""
    return beta1 * m + (1 - beta1) * g


def average_curvature(h: Tensor, h_hat: Tensor, *, beta2: float) -> Tensor:
    """Return the new curvature ``beta2 h + (1 - beta2) h_hat`` (Algorithm 3).

    ``h_hat`` estimates the diagonal of the Hessian of the *mean* loss, per coordinate: the factor B of
    Algorithm 2 is already in it.
    """
    return beta2 * h + (1 - beta2) * h_hat


def clipped_direction(m: Tensor, h: Tensor, *, gamma: float, eps: float) -> Tensor:
    """Return ``clip(m / max(gamma h, eps), 1)``, the step in units of the learning rate; entries in [-1, 1].

    >>> import torch
    >>> m = torch.tensor([1e-3, 1e-3, 1e-3, -1e-3])
    >>> h = torch.tensor([1.0, 1e-2, 0.0, -5.0])    # sharp, flat, unknown, negative
    >>> clipped_direction(m, h, gamma=0.05, eps=1e-12)
    tensor([ 0.0200,  1.0000,  1.0000, -1.0000])
    """
    return (m / (gamma * h).clamp(min=eps)).clamp(-1, 1)


def sophia_step(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    h: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    gamma: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """One step of Algorithm 3 for one tensor; return the new ``(theta, m)``. Nothing is changed in place.

    All tensors have the shape of theta; ``lr`` is the largest move of a coordinate (decay aside), a number
    or a scalar tensor of float32 or wider: in half precision ``1 - lr weight_decay`` would be 1.

    >>> import torch
    >>> theta, g, m, h = (torch.tensor([x]) for x in (1.0, 2.0, 0.0, 40.0))
    >>> theta, m = sophia_step(theta, g, m, h, lr=0.1, beta1=0.5, gamma=0.05, eps=1e-12, weight_decay=0.0)
    >>> theta, m                  # m = 1, gamma h = 2, so half of lr
    (tensor([0.9500]), tensor([1.]))
    """
    m = average_gradient(m, g, beta1=beta1)
    theta = theta * (1 - lr * weight_decay) - lr * clipped_direction(m, h, gamma=gamma, eps=eps)
    return theta, m


def look_ahead(m: Tensor, g: Tensor, *, beta1: float) -> Tensor:
    """Return ``beta1 m + (1 - beta1) g`` with the m that g is already part of: Nesterov's momentum, as in
    NAdam (Dozat 2016).
    """
    return beta1 * m + (1 - beta1) * g


def corrected_gamma(gamma: float, *, betas: tuple[float, float], step: int, refreshes: int) -> float:
    """Return the gamma that corrects m and h for their start at zero.

    They enter the rule as u / (gamma h) alone, so the correction ``m / (1 - beta1^t)``, ``h / (1 - beta2^r)``
    of Kingma and Ba is one number. ``step`` counts from 1, and u looks one step ahead of it.
    """
    h_part = 1 - betas[1] ** refreshes
    return gamma * started(betas[0], step=step) / h_part if h_part > 0 else gamma


def started(beta1: float, *, step: int) -> float:
    """Return ``1 - beta1^(step + 1)``, the part that u has of its steady size; ``step`` counts from 1."""
    return 1 - beta1 ** (step + 1)


def damped_direction(
    u: Tensor, h: Tensor, *, size: Tensor, gamma: float, eps: float, damping: float
) -> Tensor:
    """Return ``clip(u / max(gamma h, damping size, eps), 1)``.

    ``size`` is what ``usual_size`` gives, a scalar. With ``damping=0`` it is the published direction.

    >>> import torch
    >>> u, h = torch.tensor([1.0, 0.01, 1.0, 0.0]), torch.tensor([0.0, 0.0, 10.0, 0.0])
    >>> damped_direction(u, h, size=rms(u), gamma=0.2, eps=1e-12, damping=0.5)      # rms(u) = 0.7
    tensor([1.0000, 0.0283, 0.5000, 0.0000])
    """
    floor = (damping * size).clamp(min=eps)
    return (u / torch.maximum(gamma * h, floor)).clamp(-1, 1)


def usual_size(now: Tensor, last: Tensor, *, started: float) -> Tensor:
    """Return the rms of u as the step before leaves one to expect it; that of this step where there was none.

    Args:
        now: rms of u.
        last: rms of the step before, over its ``started``; 0 if there was none, or no gradient in it.
        started: ``1 - beta1^(t + 1)``, how much of a steady momentum u has t steps after its start at zero.
    """
    return torch.where(last > 0, last * started, now)


def rms(u: Tensor) -> Tensor:
    """Return the root of the mean square of u, a scalar; 0 where there is nothing."""
    return (u.square().sum() / max(u.numel(), 1)).sqrt()


def spectral_direction(
    u: Tensor, *, power: float, polar_of: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return the step of a hidden matrix, of rms 1: orthogonalised momentum, whitened by its own squares.

    The steepest descent of u among steps D with ``|| R^p D C^p || <= 1`` in the spectral norm, R and C the
    mean squares of u, the momentum (a, b), over columns and rows, relative to their mean, p the ``power``:
    rows and columns that are large in all of u get less of the step. Where they are all alike it is the step
    of Muon. ``polar_of`` is a faster way to the same as ``polar``.
    """
    u = unit_largest(u)
    rows, columns = (relative(u.square().mean(side, keepdim=True), 0.0) ** -power for side in (1, 0))
    return _of_rms_one(rows * (polar_of or polar)(rows * u * columns) * columns)


def second_moment(g: Tensor) -> Tensor:
    """Return ``g g'`` of the short side of a matrix, (n, n), n its length."""
    x = short_side_first(g)
    return x @ x.T


def whitened_direction(
    u: Tensor,
    root: Tensor,
    *,
    power: float,
    damping: float,
    polar_of: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the step of a hidden matrix, of rms 1: orthogonalised momentum, whitened by second moments.

    Args:
        u: the momentum, (a, b).
        root: P, ``inverse_power`` of the short side's second moment, (n, n).
        power: of the long side, whose second moment is the diagonal of u' u.
        damping: added to it, in units of its mean.
        polar_of: a faster way to the same as ``polar``.
    """
    u = unit_largest(u)
    x = short_side_first(u)
    mean = x.square().mean(0, keepdim=True)
    columns = relative(mean, damping) ** -power
    d = root @ (polar_of or polar)(root @ x * columns) * columns
    return _of_rms_one(d if x is u else d.T)


def factored_direction(m: Tensor, root: Tensor, r: Tensor, *, eps: float) -> Tensor:
    """Return ``P m r^-1/2``: Adam's direction with a second moment that is factored.

    Args:
        m: the momentum, (a, b), corrected for its start at zero.
        root: P, ``inverse_power`` of the short side's second moment, (n, n).
        r: the mean squares of the gradient along the short side, (N,), N the long side's length; corrected.
        eps: Adam's.

    >>> import torch
    >>> m, r = torch.tensor([[2.0, 4.0], [3.0, 3.0], [1.0, 0.0]]), torch.tensor([4.0, 9.0, 1.0])
    >>> factored_direction(m, torch.eye(2), r, eps=0.0)
    tensor([[1., 2.],
            [1., 1.],
            [1., 0.]])
    """
    x = short_side_first(m)
    d = root @ x / (r.sqrt() + eps)
    return d if x is m else d.T


def along(moment: Tensor, basis: Tensor) -> Tensor:
    """Return the diagonal of ``Q' M Q``, (n,), not below zero: second moments M along the columns of Q."""
    return ((moment @ basis) * basis).sum(0).clamp(min=0)


def inverse_power(values: Tensor, basis: Tensor, *, power: float, damping: float) -> Tensor:
    """Return ``Q (diag(values) / their mean + damping)^-power Q'``, (n, n).

    ``values`` (n,) are second moments along the columns of Q, ``basis`` (n, n); taken relative to their mean.

    >>> import torch
    >>> inverse_power(torch.tensor([4.0, 1.0, 1.0]), torch.eye(3), power=0.5, damping=0.0)
    tensor([[0.7071, 0.0000, 0.0000],
            [0.0000, 1.4142, 0.0000],
            [0.0000, 0.0000, 1.4142]])
    """
    return (basis * relative(values, damping) ** -power) @ basis.T


def eigenbasis(moment: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix, (n, n), as columns.

    Decomposed in float64: eigenvalues span twice the orders of magnitude of the singular values.
    """
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors.to(moment.dtype)


def short_side_first(x: Tensor) -> Tensor:
    """Return the matrix itself, or its transpose where it has more rows than columns."""
    return x.T if x.size(0) > x.size(1) else x


def unit_largest(x: Tensor) -> Tensor:
    """Return x over its largest entry: squares of what is left of an old momentum would be zero in float32,
    and those of a large one infinite.
    """
    return x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny) if x.numel() else x


def relative(values: Tensor, damping: float) -> Tensor:
    """``values / their mean + damping``; without any damping a millionth of the average at least."""
    mean = values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    return (values / mean + damping).clamp(min=1e-6)


def polar(x: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of x and all singular values near 1.

    Newton-Schulz iteration with the quintics ``POLAR``: products of x with itself, no decomposition.

    >>> import torch
    >>> x = torch.diag(torch.tensor([3.0, -1.0]))
    >>> (polar(x).diagonal().abs() - 1).abs().max() < 0.1
    tensor(True)
    """
    y: Tensor = short_side_first(unit_largest(x))
    y = y / torch.linalg.vector_norm(y @ y.T).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    for a, b, c in POLAR:
        gram = y @ y.T
        y = a * y + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ y
    return y if y.shape == x.shape else y.T


def _of_rms_one(d: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(d).clamp(min=1e-30)  # a tensor of zeros does not move
    return torch.div(d * math.sqrt(d.numel()), size)
