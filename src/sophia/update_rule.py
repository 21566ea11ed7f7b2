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
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["average_curvature", "average_gradient", "clipped_direction", "sophia_step"]


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

    All tensors have the shape of theta; ``lr`` is the largest move of a coordinate (decay aside).

    >>> import torch
    >>> theta, g, m, h = (torch.tensor([x]) for x in (1.0, 2.0, 0.0, 40.0))
    >>> theta, m = sophia_step(theta, g, m, h, lr=0.1, beta1=0.5, gamma=0.05, eps=1e-12, weight_decay=0.0)
    >>> theta, m                  # m = 1, gamma h = 2, so half of lr
    (tensor([0.9500]), tensor([1.]))
    """
    m = average_gradient(m, g, beta1=beta1)
    theta = theta - lr * weight_decay * theta
    theta = theta - lr * clipped_direction(m, h, gamma=gamma, eps=eps)
    return theta, m
