"""Weights of predictions, read from the gradient in the hidden states that they are made of.

The gradient must be that of a weighted cross-entropy of the output layer's logits, row by row: that shows
which layer the loss used, and what each prediction weighs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports

from sophia.likelihoods import Head, Problem, Reading
from sophia.likelihoods.before_the_head import Fit, fit_before_the_head
from sophia.likelihoods.lines import TOLERANCE, digits
from sophia.refresh.output_layer import OutputLayer
from sophia.refresh.recording import Outputs
from sophia.refresh.sampled_reading import rows_to_read

__all__ = ["ENOUGH", "OfHidden", "nearest_layer", "output_of"]

ENOUGH = 0.9
"""Share of a gradient that must be explained."""
_TRIED = 64  # predictions by which it is told which layer was used
_CHANGED = Problem(
    "another loss before the head",
    "what arrived in the hidden states was that of a cross-entropy of the output layer's logits, and is so "
    "no longer",
    "If the loss changes on purpose, use estimator='hutchinson', or mode='manual' with opt.hessian_pass()",
)


def nearest_layer(layers: Sequence[OutputLayer], hidden: Tensor, gradient: Tensor) -> tuple[OutputLayer, Fit]:
    """The layer whose logits' cross-entropy explains the gradient best, and how well.

    Args:
        layers: one at least.
        hidden: states, ``(..., d)``.
        gradient: what arrived in them, not zero everywhere.
    """
    flat, g = hidden.reshape(-1, hidden.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    rows = (g != 0).any(1).nonzero().squeeze(1)
    some, dtype = rows[:: max(1, len(rows) // _TRIED)][:_TRIED], digits(g)
    fits = [(layer, _fit(layer, flat[some], g[some])) for layer in layers]
    return min(fits, key=lambda pair: (-round(pair[1].share(dtype), 2), pair[1].noise(dtype)))


def output_of(head: Head, layer: OutputLayer, shape: torch.Size) -> Outputs:
    """The predictions that a layer makes of hidden states ``(..., d)``, before anything is known of them."""
    return Outputs(head, torch.Size([*shape[:-1], layer.weight.shape[0]]), False)


class OfHidden:
    """Hook on hidden states: reads from their gradient which predictions count, and what they weigh.

    Args:
        part: where to note it; held weakly.
        layer: that makes the predictions.
        hidden: the states, ``(..., d)``, without their graph.
        sample: key of the sample of predictions that are read; None for all.
        maximize: whether the gradient is minus that of a loss.
    """

    def __init__(
        self,
        part: Outputs,
        layer: OutputLayer,
        hidden: Tensor,
        *,
        sample: tuple[int, ...] | None,
        maximize: bool,
    ) -> None:
        self._part, self._layer, self._hidden = weakref.ref(part), layer, hidden
        self._sample, self._maximize = sample, maximize

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        part = self._part()
        if part is None or gradient is None:
            return
        if self._layer.in_lockstep or self._layer.is_sharded:
            part.unread_gradients.append((self.read, gradient.detach().clone()))
            return
        self.read(self._layer, gradient)

    def read(self, layer: OutputLayer, gradient: Tensor) -> None:
        """The same, by a layer whose parameters are whole."""
        part = self._part()
        if part is None:
            return
        width = gradient.shape[-1]
        flat, g = self._hidden.reshape(-1, width), gradient.detach().reshape(-1, width)
        g = -g if self._maximize else g
        counted = (g != 0).any(1)
        mask = counted.view(part.prediction_shape)
        part.mask = mask if part.mask is None else part.mask | mask
        if not bool(counted.any()):
            return
        rows = counted.nonzero().squeeze(1)
        _read(part, layer, flat, g, rows, rows_to_read(len(rows), self._sample))


def _read(
    part: Outputs,
    layer: OutputLayer,
    hidden: Tensor,
    gradient: Tensor,
    rows: Tensor,
    chosen: Tensor | None,
) -> None:
    """Read the weights, given the hidden states and their gradients ``(n, d)``, the rows that count, and
    which of these to read.
    """
    dtype = digits(gradient)
    some = rows if chosen is None else rows[chosen.to(rows.device)]
    fit = _fit(layer, hidden[some], gradient[some])
    good, share = fit.good(dtype), fit.share(dtype)
    if share < ENOUGH:
        part.take(Reading(None, _CHANGED, share))
        part.problems.append(_CHANGED)
        return
    middle = fit.weights[good].median()
    weights = torch.where(good, fit.weights, middle)
    # Weights that differ by no more than they are known by are one.
    known = max(2 * TOLERANCE.get(dtype, 1e-3), 3 * fit.noise(dtype))
    near = (weights - middle).abs() <= known * middle.abs()
    part.equal = bool(near.all()) and len(rows) >= len(hidden) / 2
    every = torch.zeros(len(hidden), dtype=weights.dtype, device=hidden.device)
    if bool(near.all()):
        every[rows] = middle
    else:
        every[some] = weights * (len(rows) / len(some))
    shown = good.nonzero().squeeze(1)[:_TRIED]
    problem = _problem(part, layer, hidden[some[shown]], fit.labels[shown], weights[shown])
    if problem is not None:
        part.problems.append(problem)
    negative = bool((weights < 0).any())
    part.take(Reading(None if negative else every.view(part.prediction_shape), problem, share))


def _problem(
    part: Outputs, layer: OutputLayer, hidden: Tensor, labels: Tensor, weights: Tensor
) -> Problem | None:
    """What the loss seems to be, of the gradient in the logits of some predictions, made anew."""
    with torch.no_grad():
        logits, _ = layer.logits_and_slopes(hidden)
    dense = logits.softmax(-1)
    dense[torch.arange(len(labels), device=labels.device), labels] -= 1
    likelihood = part.head.likelihood
    every = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    return likelihood.weights(dense * weights[:, None], likelihood.probes(logits), every).problem


def _fit(layer: OutputLayer, hidden: Tensor, gradient: Tensor) -> Fit:
    return fit_before_the_head(gradient, hidden, layer.logits_and_slopes, layer.weight)
