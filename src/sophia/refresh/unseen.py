"""Predictions that neither the output of a recorded forward nor its graph showed, found by one more forward.

A compiled graph with the loss inside, and a fused linear cross-entropy, return no logits and send no gradient
to any. But what arrived in the tensors that they returned is known, and so the forward is run again, outside
of compiled graphs, and these gradients are propagated to where the predictions are: to the softmax in the
loss's own graph, or to the last hidden states (``hidden_reading.py``). Nothing but the loss is
differentiated: the way back ends before the trunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sophia.checks import SophiaWarning
from sophia.likelihoods.lines import digits
from sophia.refresh.counted import mask_from_labels
from sophia.refresh.eager import eager
from sophia.refresh.hidden_reading import ENOUGH, OfHidden, nearest_layer, output_of
from sophia.refresh.listeners import OfOutput
from sophia.refresh.loss_graph import Inside, LossGraph, found_inside
from sophia.refresh.moved_state import same_state
from sophia.refresh.output_layer import BeforeTheHead, HiddenStates, output_layers
from sophia.refresh.places import at
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Outputs, Recording
from sophia.refresh.replay import detached
from sophia.refresh.sampled_reading import take_probes

__all__ = ["find_unseen"]

_RETURNED = 4  # tensors with a gradient that are looked at: of the states of all layers the last ones
_THROUGH = 0.05  # of a gradient, that may be missing where all of it came through others


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
        if not arrived and _is_of_another_loss(recorder, recording):
            _find_beside_logits(recorder, recording)


def _is_of_another_loss(recorder: Recorder, recording: Recording) -> bool:
    """Whether no gradient reached the outputs, and the loss that the model returned is not the mean
    cross-entropy of the labels among its inputs.
    """
    hidden = bool(recording.outputs) and all(part.mask is None for part in recording.outputs)
    if not hidden or recorder.named or recording.loss_gradient is None or recording.loss_place is None:
        return False
    labels = mask_from_labels(recorder, recording, recording.outputs[0])
    return labels is None or not recorder.loss_is_mean


def _find_beside_logits(recorder: Recorder, recording: Recording) -> None:
    """Read such a loss where it is made, in the place of the logits beside it, if it can be seen."""
    assert recording.loss_gradient is not None
    assert recording.loss_place is not None
    outputs, recording.outputs = recording.outputs, ()
    if not _found(recorder, recording, {recording.loss_place: recording.loss_gradient}):
        recording.outputs = outputs
        if "loss" not in recorder.guessed:
            recorder.guessed.add("loss")
            warnings.warn(
                f"the loss that {type(recorder.model).__name__} returns is not the mean cross-entropy of the "
                "labels among its inputs, and what it is made of could not be found: h is that of a mean. "
                "Compute the loss outside of the model, or use estimator='hutchinson'",
                SophiaWarning,
            )


def _found(recorder: Recorder, recording: Recording, arrived: dict[Any, Tensor]) -> bool:
    model, head, states = recorder.model, recorder.heads[0], HiddenStates()
    same = same_state(model, moving=recorder.witnesses.moving)
    with recording.autocast.again(), eager(), states.noted(model), same, torch.enable_grad():
        recording.conditions.begin_again(model)
        output = model(*detached(recording.args), **detached(dict(recording.kwargs)))
    returned = [(at(output, place), gradient) for place, gradient in arrived.items()]
    pairs = [(t, g) for t, g in returned if t is not None and t.grad_fn is not None and t.shape == g.shape]
    if not pairs:
        return False
    with torch.enable_grad():
        inside = found_inside([t for t, _ in pairs], head) if not recording.outputs else []
        if inside:
            gradients = _gradients_in([each.edge for each in inside], pairs)
            _read_inside(recorder, recording, inside, gradients)
            return True
        if head.likelihood.event_dims != 1:
            return False
        return _read_hidden(recorder, recording, states, pairs)


def _gradients_in(
    wanted: Sequence[GradientEdge], pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor | None]:
    """What the gradients that arrived in returned tensors come to inside of the model.

    Less what came through others of these: a hidden state that is returned beside the loss made of it gets
    its gradient through that loss. One backward where there is no more: a function of the user's may not
    stand another.
    """
    if not wanted:
        return []
    latest_first = sorted(pairs, key=lambda pair: -pair[0].grad_fn._sequence_nr())  # type: ignore[union-attr]
    (first, gradient), *others = latest_first[:_RETURNED]
    found: list[Tensor | None] = [None] * len(wanted)
    while True:
        inner = [*wanted, *(get_gradient_edge(t) for t, _ in others)]
        through = torch.autograd.grad(first, inner, gradient, retain_graph=True, allow_unused=True)
        found = [b if a is None else a if b is None else a + b for a, b in zip(found, through, strict=False)]
        left = [
            (t, arrived if got is None else arrived - got, float(arrived.norm()))
            for (t, arrived), got in zip(others, through[len(wanted) :], strict=True)
        ]
        others = [(t, rest) for t, rest, size in left if float(rest.norm()) > _THROUGH * size]
        if not others:
            return found
        (first, gradient), *others = others


def _read_inside(
    recorder: Recorder, recording: Recording, inside: list[Inside], gradients: list[Tensor | None]
) -> None:
    head = recorder.heads[0]
    parts = []
    for each, gradient in zip(inside, gradients, strict=True):
        part = Outputs(head, each.values.shape, True)
        take_probes(part, each.values, recorder.sample)
        if gradient is not None:
            OfOutput(part, recorder)(each.as_predictions(gradient))
        parts.append(part)
    recording.outputs, recording.source, recording.others = tuple(parts), LossGraph(head), []


def _read_hidden(
    recorder: Recorder, recording: Recording, states: HiddenStates, pairs: list[tuple[Tensor, Tensor]]
) -> bool:
    """Give the recording its output, made of the first states whose gradient fits; whether there are any."""
    model, known = recorder.model, recorder.layer
    forms = [form for form in states.forms() if known is None or form == known.form]
    layers = {form: output_layers(model, form[-1]) if known is None else [known.layer] for form in forms}
    forms = [form for form in forms if layers[form]]
    hidden = [states.of_form(form) for form in forms]
    gradients = _gradients_in([get_gradient_edge(t) for t in hidden], pairs)
    for form, state, gradient in zip(forms, hidden, gradients, strict=True):
        if gradient is None or not bool(gradient.any()):
            continue
        turned = -gradient if recorder.maximize else gradient
        layer, fit = nearest_layer(layers[form], state.detach(), turned)
        if known is None and fit.share(digits(gradient)) < ENOUGH:
            continue
        part = output_of(recorder.heads[0], layer, state.shape)
        read = OfHidden(part, layer, state.detach(), sample=recorder.sample, maximize=recorder.maximize)
        read(gradient)
        recording.outputs, recording.others = (part,), []
        recorder.layer = BeforeTheHead(model, layer, form, states.maker_of(form))
        recording.source = recorder.layer
        if any(t.ndim and t.shape[-1] == form[-1] for t, _ in pairs):
            recorder.hidden_width = form[-1]
        return True
    return False


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
