"""Weights of predictions, read from the gradient in the hidden states that they are made of.

The gradient must be that of a weighted cross-entropy of the output layer's logits, row by row: that shows
which layer the loss used, and what each prediction weighs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sophia.likelihoods import Problem, Reading
from sophia.likelihoods.before_the_head import Fit, fit_before_the_head
from sophia.likelihoods.lines import TOLERANCE, digits
from sophia.refresh.output_layer import BeforeTheHead, Form, HiddenStates, OutputLayer, output_layers
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Outputs, Recording
from sophia.refresh.sampled_reading import rows_to_read

__all__ = ["HiddenReading"]

_TRIED = 64  # predictions by which it is told which layer was used
_CHANGED = Problem(
    "another loss before the head",
    "what arrived in the hidden states was that of a cross-entropy of the output layer's logits, and is so "
    "no longer",
    "If the loss changes on purpose, use estimator='hutchinson', or mode='manual' with opt.hessian_pass()",
)


class HiddenReading:
    """The states of one forward that may be those before an output layer.

    Args:
        recorder: whose model it was; it remembers where the predictions were found once.
        states: of that forward.
    """

    def __init__(self, recorder: Recorder, states: HiddenStates) -> None:
        self._recorder = recorder
        known = recorder.layer
        forms = states.forms() if known is None else [form for form in states.forms() if form == known.form]
        self._candidates: list[tuple[Form, list[OutputLayer]]] = []
        for form in forms:
            layers = output_layers(recorder.model, form[-1]) if known is None else [known.layer]
            if layers:
                self._candidates.append((form, layers))
        self.tensors = [states.of_form(form) for form, _ in self._candidates]
        """Of which the gradients are wanted."""

    def read(
        self, recording: Recording, gradients: Sequence[Tensor | None], *, returned: Sequence[Tensor]
    ) -> bool:
        """Give the recording its output, made of the first states whose gradient fits; whether there are any.

        Args:
            recording: of the forward.
            gradients: in `tensors`.
            returned: tensors that the model returned, in which gradients arrived.
        """
        for (form, layers), hidden, gradient in zip(self._candidates, self.tensors, gradients, strict=True):
            if gradient is None or not bool(gradient.any()):
                continue
            found = self._output(layers, hidden, gradient)
            if found is None:
                continue
            part, layer = found
            recording.outputs, recording.others = (part,), []
            recording.source = self._recorder.layer = BeforeTheHead(self._recorder.model, layer, form)
            if any(t.ndim and t.shape[-1] == form[-1] for t in returned):
                self._recorder.hidden_width = form[-1]
            return True
        return False

    def _output(
        self, layers: Sequence[OutputLayer], hidden: Tensor, gradient: Tensor
    ) -> tuple[Outputs, OutputLayer] | None:
        width = hidden.shape[-1]
        flat, g = hidden.detach().reshape(-1, width), gradient.reshape(-1, width)
        g = -g if self._recorder.maximize else g
        counted = (g != 0).any(1)
        rows = counted.nonzero().squeeze(1)
        some = rows[:: max(1, len(rows) // _TRIED)][:_TRIED]
        dtype = digits(g)
        fits = [(_fit(layer, flat[some], g[some]), layer) for layer in layers]
        fit, layer = min(fits, key=lambda pair: (-round(pair[0].share(dtype), 2), pair[0].noise(dtype)))
        fitting = fit.share(dtype) >= 0.9
        if not fitting and self._recorder.layer is None:
            return None
        shape = torch.Size([*hidden.shape[:-1], layer.weight.shape[0]])
        part = Outputs(self._recorder.heads[0], shape, False)
        part.mask = counted.view(part.prediction_shape)
        if fitting:
            _read(part, layer, flat, g, rows, rows_to_read(len(rows), self._recorder.sample))
        else:
            part.take(Reading(None, _CHANGED, fit.share(dtype)))
            part.problems.append(_CHANGED)
        return part, layer


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
    good = fit.good(dtype)
    if not bool(good.any()):
        part.take(Reading(None))
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
    part.take(Reading(None if negative else every.view(part.prediction_shape), problem, fit.share(dtype)))


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
