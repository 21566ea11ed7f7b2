"""Sophia written a second time, in float64 numpy and one coordinate at a time where that is clearer; and ways
to set the curvature by hand.

Nothing here imports the update rule or the kernels: what they share with this file would not be tested.
"""

from __future__ import annotations

import numpy as np
import torch

from sophia.curvature import Estimate, Estimator
from sophia.curvature.estimate import PassByHand

SETTINGS = {"lr": 6e-4, "beta1": 0.96, "beta2": 0.99, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.1}


def array(tensor):
    """A float64 numpy copy, in logical order."""
    return tensor.detach().to(torch.float64).numpy().copy()


def paper_step(theta, g, m, h, *, lr, beta1, gamma, eps, weight_decay):
    """Algorithm 3, lines 6 and 12-13, as printed; returns (theta, m)."""
    m = beta1 * m + (1 - beta1) * g
    theta = theta - lr * weight_decay * theta
    with np.errstate(over="ignore"):  # m / eps may be inf: it is clipped to 1
        return theta - lr * np.clip(m / np.maximum(gamma * h, eps), -1.0, 1.0), m


def official_step(theta, g, m, h_off, *, lr, beta1, rho, bs, weight_decay):
    """The official repository's step: h lacks the factor B, which comes in as ``bs``; returns (theta, m)."""
    theta = theta * (1 - lr * weight_decay)
    m = beta1 * m + (1 - beta1) * g
    ratio = np.minimum(np.abs(m) / (rho * bs * h_off + 1e-15), 1.0)
    return theta - lr * np.sign(m) * ratio, m


class Reference:
    """Several steps over several arrays; ``None`` gradients leave their parameter alone, as frozen ones
    are.
    """

    def __init__(self, tensors, *, maximize=False, **settings):
        self.thetas = [array(t) for t in tensors]
        self.ms = [np.zeros_like(t) for t in self.thetas]
        self.hs = [np.zeros_like(t) for t in self.thetas]
        self.smallest = [np.full_like(t, np.inf) for t in self.thetas]  # |m| over the steps
        self.sign = -1.0 if maximize else 1.0
        self.settings = {**SETTINGS, **settings}

    def refresh(self, diagonals):
        """Average the diagonals into h."""
        beta2 = self.settings["beta2"]
        self.hs = [beta2 * h + (1 - beta2) * array(d) for h, d in zip(self.hs, diagonals, strict=True)]

    def step(self, gradients):
        """One step with one gradient a parameter."""
        settings = {name: value for name, value in self.settings.items() if name != "beta2"}
        for i, g in enumerate(gradients):
            if g is not None:
                self.thetas[i], self.ms[i] = paper_step(
                    self.thetas[i], self.sign * array(g), self.ms[i], self.hs[i], **settings
                )
                self.smallest[i] = np.minimum(self.smallest[i], np.abs(self.ms[i]))


class Given(Estimator):
    """An estimator that returns ``diagonal_of(parameter)``: curvature without a model.

    The diagonals may be changed through the attribute ``diagonal_of`` at any time.
    """

    def __init__(self, diagonal_of=torch.ones_like):
        self.diagonal_of = diagonal_of

    def estimate(self, context):
        """Return what was given."""
        return Estimate([self.diagonal_of(p.detach()) for p in context.parameters], 1.0)

    def by_hand(self, context):
        """Return a handle that needs no loss."""
        estimate = self.estimate(context)

        class Handle(PassByHand):
            def finish(self):
                return estimate

        return Handle()


def set_curvature(optimizer, diagonals):
    """Renew h from these diagonals (in the order of the parameters) by a pass by hand; needs ``Given``.

    Those of parameters whose rule has no curvature are left out.
    """
    every = [p for group in optimizer.param_groups for p in group["params"]]
    asked = {id(p) for p in optimizer._with_curvature()} or {id(p) for p in every}
    given = iter([d for p, d in zip(every, diagonals, strict=True) if id(p) in asked])
    optimizer.estimator.diagonal_of = lambda _: next(given)
    with optimizer.hessian_pass():
        pass


def noise_like(parameters, seed, scale=1.0):
    """A gradient for each parameter, in its dtype and layout; depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for p in parameters:
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        found.append(torch.empty_like(p.detach()).copy_(values))
    return found


def curvature_of(parameters, seed):
    """A diagonal for each parameter: a good part so large that steps are not clipped, some zero, some
    negative.
    """
    return [g * g * g * 20 * (g > -1) for g in noise_like(parameters, 1000 + seed)]


def give(parameters, gradients):
    """Set ``.grad``."""
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
