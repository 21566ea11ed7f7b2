"""Predictions that neither the output of a recorded forward nor its graph showed, found by one more forward.

A compiled graph with the loss inside, and a fused linear cross-entropy, return no logits and send no gradient
to any. But what arrived in the tensors that they returned is known, and so the forward is run again, outside
of compiled graphs, and these gradients are propagated to where the predictions are: to the softmax in the
loss's own graph, or to the last hidden states, where they must be those of a cross-entropy of the output
layer's logits. Nothing but the loss is differentiated: the way back ends before the trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.likelihoods import Problem, Reading
from sophia.likelihoods.before_the_head import Fit, fit_before_the_head
from sophia.likelihoods.lines import TOLERANCE, digits
from sophia.refresh.listeners import OfOutput
from sophia.refresh.loss_graph import Inside, LossGraph, found_inside
from sophia.refresh.moved_state import same_state
from sophia.refresh.output_layer import BeforeTheHead, HiddenStates, OutputLayer, output_layers
from sophia.refresh.places import at
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Outputs, Recording
from sophia.refresh.replay import detached
from sophia.refresh.sampled_reading import rows_to_read, take_probes

__all__ = ["find_unseen"]

_RETURNED = 4  # tensors with a gradient that are looked at: of the states of all layers the last ones
_THROUGH = 0.05  # of a gradient, that may be missing where all of it came through others
_TRIED = 64  # predictions by which it is told which layer was used
_CHANGED = Problem(
    "another loss before the head",
    "what arrived in the hidden states was that of a cross-entropy of the output layer's logits, and is so "
    "no longer",
    "If the loss changes on purpose, use estimator='hutchinson', or mode='manual' with opt.hessian_pass()",
)


def find_unseen(recorder: Recorder, recordings: Sequence[Recording]) -> None:
    """Find the outputs of recordings that have none, or such as the likelihood cannot be about.

    Raises:
        RuntimeError: there are no predictions to be found.
    """
    for recording in recordings:
        arrived = dict(recording.arrived)
        for part in recording.outputs:
            if part.gradient is not None:
                arrived[recording.first or ()] = part.gradient
        if arrived and not _found(recorder, recording, arrived) and not recording.outputs:
            raise RuntimeError(_nothing_found(recorder, arrived))
        recording.arrived = {}


def _found(recorder: Recorder, recording: Recording, arrived: dict[Any, Tensor]) -> bool:
    model, states = recorder.model, HiddenStates()
    same = same_state(model, moving=recorder.witnesses.moving)
    source = BeforeTheHead(model, OutputLayer("", model), (0, 0), states)
    with recording.autocast.again(), source.seen(), same, torch.enable_grad():
        recording.conditions.begin_again(model)
        output = model(*detached(recording.args), **detached(dict(recording.kwargs)))
        returned = [(at(output, place), gradient) for place, gradient in arrived.items()]
        pairs = _direct(
            [(t, g) for t, g in returned if t is not None and t.grad_fn is not None and t.shape == g.shape]
        )
        if not pairs:
            return False
        inside = found_inside([t for t, _ in pairs], recorder.heads[0]) if not recording.outputs else []
        if inside:
            _read_inside(recorder, recording, inside, pairs)
            return True
        return recorder.heads[0].likelihood.event_dims == 1 and _read_hidden(
            recorder, recording, states, pairs
        )


def _direct(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The gradients that a loss sent to returned tensors itself, less what came through others of them: a
    hidden state that is returned beside the loss made of it gets its gradient through that loss.
    """
    latest_first = sorted(pairs, key=lambda pair: -pair[0].grad_fn._sequence_nr())  # type: ignore[union-attr]
    direct: list[tuple[Tensor, Tensor]] = []
    for tensor, gradient in latest_first[:_RETURNED]:
        if direct:
            later, theirs = [t for t, _ in direct], [g for _, g in direct]
            (through,) = torch.autograd.grad(later, tensor, theirs, retain_graph=True, allow_unused=True)
            if through is not None:
                rest = gradient - through
                if float(rest.norm()) <= _THROUGH * float(gradient.norm()):
                    continue
                gradient = rest
        direct.append((tensor, gradient))
    return direct


def _read_inside(
    recorder: Recorder, recording: Recording, inside: list[Inside], pairs: list[tuple[Tensor, Tensor]]
) -> None:
    head = recorder.heads[0]
    parts = []
    for each in inside:
        part = Outputs(head, each.values.shape, True)
        take_probes(part, each.values, recorder.sample)
        gradient = each.gradient([t for t, _ in pairs], [g for _, g in pairs])
        if gradient is not None:
            OfOutput(part, recorder)(gradient)
        parts.append(part)
    recording.outputs, recording.source = tuple(parts), LossGraph(head)


def _read_hidden(
    recorder: Recorder, recording: Recording, states: HiddenStates, pairs: list[tuple[Tensor, Tensor]]
) -> bool:
    """Read the weights of predictions from the gradient in the hidden states that they are made of."""
    tensors, gradients = [t for t, _ in pairs], [g for _, g in pairs]
    for form in states.forms():
        width = form[0]
        known = recorder.layer is not None and recorder.layer.form == form
        layers = [recorder.layer.layer] if known and recorder.layer else output_layers(recorder.model, width)
        if not layers:
            continue
        hidden = states.of_form(form)
        (gradient,) = torch.autograd.grad(tensors, hidden, gradients, retain_graph=True, allow_unused=True)
        if gradient is None or not bool(gradient.any()):
            continue
        flat, g = hidden.detach().reshape(-1, width), gradient.reshape(-1, width)
        counted = (g != 0).any(1)
        rows = counted.nonzero().squeeze(1)
        some = rows[:: max(1, len(rows) // _TRIED)][:_TRIED]
        dtype = digits(g)
        fits = [(_fit(layer, flat[some], g[some]), layer) for layer in layers]
        fit, layer = min(fits, key=lambda pair: (-round(pair[0].share(dtype), 2), pair[0].noise(dtype)))
        fitting = fit.share(dtype) >= 0.9
        if not fitting and not known:
            continue
        part = Outputs(recorder.heads[0], torch.Size([*hidden.shape[:-1], layer.weight.shape[0]]), False)
        part.mask = counted.view(part.prediction_shape)
        if fitting:
            _read(part, recorder, layer, flat, g, rows, dtype)
        else:
            part.take(Reading(None, _CHANGED, fit.share(dtype)))
            part.problems.append(_CHANGED)
        recording.outputs = (part,)
        recording.others = []
        recording.source = recorder.layer = BeforeTheHead(recorder.model, layer, form)
        if any(t.ndim and t.shape[-1] == width for t in tensors):
            recorder.hidden_width = width
        return True
    return False


def _read(
    part: Outputs,
    recorder: Recorder,
    layer: OutputLayer,
    hidden: Tensor,
    gradient: Tensor,
    rows: Tensor,
    dtype: torch.dtype,
) -> None:
    """Read the weights, given the hidden states and their gradients ``(n, d)`` and the rows that count."""
    chosen = rows_to_read(len(rows), recorder.sample)
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


def _nothing_found(recorder: Recorder, arrived: dict[Any, Tensor]) -> str:
    name = type(recorder.model).__name__
    what = "its loss, one number," if all(g.ndim == 0 for g in arrived.values()) else "no logits,"
    return (
        f"{name} returns {what} and where the predictions are made could not be found: its loss shows no "
        "softmax (a function of its own, another likelihood?), and what arrived in its hidden states is not "
        "the gradient of a cross-entropy of an output layer's logits. Labels cannot be drawn from a loss. "
        "Let it return the logits as well (a mapping or an object with logits, or a tuple), or pass "
        "logits_fn=, a function from its output to them; for a loss that is no cross-entropy give "
        "likelihood=, or use estimator='hutchinson', which needs the loss alone, or mode='manual'"
    )
