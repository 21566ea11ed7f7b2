"""One more forward of a recorded micro-batch, and what of its inside the gradients that arrived speak of.

They are propagated to where the predictions are: to the softmax in the loss's own graph, or to the last
hidden states (``hidden_reading.py``). Nothing but the loss is differentiated: the way back ends before the
trunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from sophia.checks import SophiaWarning
from sophia.distributed.collectives import Ranks
from sophia.distributed.wrappers import reshard
from sophia.likelihoods.lines import digits
from sophia.refresh.eager import eager
from sophia.refresh.hidden_reading import ENOUGH, OfHidden, nearest_layer, output_of
from sophia.refresh.listeners import OfOutput
from sophia.refresh.loss_graph import Inside, LossGraph, found_inside, other_losses
from sophia.refresh.moved_state import same_state
from sophia.refresh.noise import Noise, cuda_devices
from sophia.refresh.output_layer import BeforeTheHead, Form, HiddenStates, OutputLayer, output_layers
from sophia.refresh.places import at
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Outputs, Recording
from sophia.refresh.replay import detached
from sophia.refresh.sampled_reading import take_probes

__all__ = ["Empty", "Finding", "came_by_loss_alone", "made_of", "nothing_counts"]

_THROUGH = 0.05  # of a gradient, that may be missing where all of it came through others


def came_by_loss_alone(recording: Recording) -> bool:
    """Whether no gradient reached its outputs, and one the loss that was returned beside them."""
    hidden = bool(recording.outputs) and all(part.mask is None for part in recording.outputs)
    return hidden and recording.loss_gradient is not None and recording.loss_place is not None


@dataclass(frozen=True)
class Empty:
    """A recording in which nothing counts, with the states of which its predictions may be made."""

    recording: Recording
    shapes: dict[Form, torch.Size]
    makers: dict[Form, nn.Module | None]


class Finding:
    """The search for the outputs of one recording."""

    def __init__(self, recorder: Recorder, recording: Recording, ranks: Ranks) -> None:
        self._recorder, self._recording, self._ranks = recorder, recording, ranks
        self.empty: list[Empty] = []
        """The recording, if nothing in it counts, and its outputs are not known."""

    def run(self) -> str | None:
        """Give the recording its outputs; why that cannot be, if it cannot."""
        recording = self._recording
        if isinstance(recording.source, BeforeTheHead):
            layer = recording.source.layer.gathered()
            for part in recording.outputs:
                for read, gradient in part.unread_gradients:
                    read(layer, gradient)
                part.unread_gradients = []
            return None
        arrived: dict[Any, Tensor | None] = dict(recording.arrived)
        for part in recording.outputs:
            if part.gradient is not None:
                arrived[recording.first or ()] = part.gradient
        recording.arrived = {}
        if not arrived and came_by_loss_alone(recording):
            self._find_beside_logits()
            return None
        if not arrived:  # another rank looks for them, and all forwards must be the same
            arrived[recording.first or ()] = None
        found = self._found(arrived)
        return None if found or recording.outputs else _nothing_found(self._recorder, arrived)

    def _find_beside_logits(self) -> None:
        """Read such a loss where it is made, in the place of the logits beside it, if it can be seen."""
        recorder, recording = self._recorder, self._recording
        outputs, recording.outputs = recording.outputs, ()
        if not self._found({recording.loss_place: recording.loss_gradient}):
            recording.outputs = outputs
            if "loss" not in recorder.guessed:
                recorder.guessed.add("loss")
                warnings.warn(
                    f"the loss that {type(recorder.model).__name__} returns is not the mean cross-entropy of "
                    "the labels among its inputs, and what it is made of could not be found: h is that of a "
                    "mean. Compute the loss outside of the model, or use estimator='hutchinson'",
                    SophiaWarning,
                )

    def _found(self, arrived: dict[Any, Tensor | None]) -> bool:
        recorder, recording = self._recorder, self._recording
        model, head, states = recorder.model, recorder.heads[0], HiddenStates()
        same = same_state(model, moving=recorder.witnesses.moving)
        witness, noise = recording.conditions.witness, Noise(cuda_devices(model.parameters()))
        with recording.autocast.again(), eager(), states.noted(model), same, torch.enable_grad():
            recording.conditions.begin_again(model)
            if witness is not None:  # the dropout that the gradients have been through
                witness.noise.restore()
            output = model(*detached(recording.args), **detached(dict(recording.kwargs)))
        noise.restore()  # that of the refresh
        returned = [(at(output, place), gradient) for place, gradient in arrived.items()]
        pairs = [
            (t, torch.zeros_like(t) if g is None else g)
            for t, g in returned
            if t is not None and t.grad_fn is not None and (g is None or t.shape == g.shape)
        ]
        if not pairs:
            return False
        with torch.enable_grad():
            inside = found_inside([t for t, _ in pairs], head) if not recording.outputs else []
            if inside:
                gradients = self._gradients_in([each.edge for each in inside], pairs)
                self._read_inside(inside, gradients)
                recording.other_losses = other_losses([t for t, _ in pairs], head)
                found = True
            else:
                found = head.likelihood.event_dims == 1 and self._read_hidden(states, pairs)
        if self._ranks.lockstep:
            reshard(model)
        return found

    def _gradients_in(
        self, wanted: Sequence[GradientEdge], pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor | None]:
        """What the gradients that arrived in returned tensors come to inside of the model.

        Less what came through others of these: a hidden state that is returned beside the loss made of it
        gets its gradient through that loss. One backward where there is no more: a function of the user's may
        not stand another.
        """
        if not wanted:
            return []
        latest_first = sorted(pairs, key=lambda pair: -pair[0].grad_fn._sequence_nr())  # type: ignore[union-attr]
        (first, gradient), *others = latest_first
        found: list[Tensor | None] = [None] * len(wanted)
        while True:
            inner = [*wanted, *(get_gradient_edge(t) for t, _ in others)]
            try:
                through = torch.autograd.grad(first, inner, gradient, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise RuntimeError(
                    f"what {type(self._recorder.model).__name__} makes its loss of cannot be looked at: "
                    f"{error}\nWith activation checkpointing take use_reentrant=False, or leave the loss out "
                    "of what is checkpointed; or let the model return the logits"
                ) from error
            found = [
                b if a is None else a if b is None else a + b for a, b in zip(found, through, strict=False)
            ]
            left = [
                (t, arrived if got is None else arrived - got, float(arrived.norm()))
                for (t, arrived), got in zip(others, through[len(wanted) :], strict=True)
            ]
            direct = self._on_any([float(rest.norm()) > _THROUGH * size for _, rest, size in left])
            others = [(t, rest) for (t, rest, _), own in zip(left, direct, strict=True) if own]
            if not others:
                return found
            (first, gradient), *others = others

    def _on_any(self, flags: list[bool]) -> list[bool]:
        """Flags that decide what is run next: where ranks wait for each other, those of all of them."""
        return self._ranks.any_of(*flags) if flags and self._ranks.lockstep else flags

    def _read_inside(self, inside: list[Inside], gradients: list[Tensor | None]) -> None:
        recorder, recording, head = self._recorder, self._recording, self._recorder.heads[0]
        parts = []
        for each, gradient in zip(inside, gradients, strict=True):
            part = Outputs(head, each.values.shape, True)
            take_probes(part, each.values, recorder.sample)
            if gradient is not None:
                OfOutput(part, recorder)(each.as_predictions(gradient))
            parts.append(part)
        recording.outputs, recording.source, recording.others = tuple(parts), LossGraph(head), []

    def _read_hidden(self, states: HiddenStates, pairs: list[tuple[Tensor, Tensor]]) -> bool:
        """Give the recording its output, made of the first states whose gradient fits; whether there are
        any.
        """
        model, known = self._recorder.model, self._recorder.layer
        forms = [form for form in states.forms() if known is None or form == known.form]
        layers = {form: output_layers(model, form[-1]) if known is None else [known.layer] for form in forms}
        forms = [form for form in forms if layers[form]]
        hidden = [states.of_form(form) for form in forms]
        gradients = self._gradients_in([get_gradient_edge(t) for t in hidden], pairs)
        here = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        for form, state, gradient, anywhere in zip(forms, hidden, gradients, self._on_any(here), strict=True):
            if not anywhere:
                continue
            own = gradient if gradient is not None and bool(gradient.any()) else None
            whole = [layer.gathered() for layer in layers[form]]
            fitting = None if own is None else self._fitting(whole, state.detach(), own, known is not None)
            number = -1 if fitting is None else fitting
            if self._ranks.lockstep:
                number = int(self._ranks.highest(number))
            if number < 0:
                continue
            layer = replace(layers[form][number], in_lockstep=self._ranks.lockstep)
            self._recorder.layer = BeforeTheHead(model, layer, form, states.maker_of(form))
            if any(t.ndim and t.shape[-1] == form[-1] for t, _ in pairs):
                self._recorder.hidden_width = form[-1]
            if own is not None and fitting is None:
                return False
            part = made_of(self._recorder, self._recording, state.shape)
            if own is not None:
                OfHidden(
                    part,
                    layer,
                    state.detach(),
                    sample=self._recorder.sample,
                    maximize=self._recorder.maximize,
                ).read(whole[number], own)
            return True
        something = any(bool(gradient.any()) for _, gradient in pairs)
        if any(here) or (something and all(gradient is None for gradient in gradients)):
            return False
        shapes = {form: state.shape for form, state in zip(forms, hidden, strict=True)}
        self.empty.append(Empty(self._recording, shapes, {form: states.maker_of(form) for form in forms}))
        return True

    def _fitting(
        self, layers: Sequence[OutputLayer], hidden: Tensor, gradient: Tensor, known: bool
    ) -> int | None:
        """The number of the layer that explains a gradient; None if none does, and none is known."""
        turned = -gradient if self._recorder.maximize else gradient
        layer, fit = nearest_layer(layers, hidden, turned)
        return (
            next(i for i, each in enumerate(layers) if each is layer)
            if (known or fit.share(digits(gradient)) >= ENOUGH)
            else None
        )


def made_of(recorder: Recorder, recording: Recording, shape: torch.Size) -> Outputs:
    """Give a recording the output that the known layer makes of its hidden states; nothing in it counts
    yet.
    """
    assert recorder.layer is not None
    part = output_of(recorder.heads[0], recorder.layer.layer, shape)
    part.mask = nothing_counts(recorder, part.prediction_shape)
    recording.outputs, recording.others, recording.source = (part,), [], recorder.layer
    return part


def nothing_counts(recorder: Recorder, shape: Sequence[int]) -> Tensor:
    """The mask of predictions none of which counts."""
    return torch.zeros(*shape, dtype=torch.bool, device=next(recorder.model.parameters()).device)


def _nothing_found(recorder: Recorder, arrived: dict[Any, Tensor | None]) -> str:
    name = type(recorder.model).__name__
    what = (
        "its loss, one number," if all(g is None or g.ndim == 0 for g in arrived.values()) else "no logits,"
    )
    return (
        f"{name} returns {what} and where the predictions are made could not be found: its loss shows no "
        "softmax (a function of its own, another likelihood?), and what arrived in its hidden states is not "
        "the gradient of a cross-entropy of an output layer's logits. Labels cannot be drawn from a loss. "
        "Let it return the logits as well (a mapping or an object with logits, or a tuple), or pass "
        "logits_fn=, a function from its output to them; for a loss that is no cross-entropy give "
        "likelihood=, or use estimator='hutchinson', which needs the loss alone, or mode='manual'"
    )
