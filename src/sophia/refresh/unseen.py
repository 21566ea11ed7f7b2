"""Predictions that neither the output of a recorded forward nor its graph showed, found by one more forward.

A compiled graph with the loss inside, and a fused linear cross-entropy, return no logits and send no gradient
to any. But what arrived in the tensors that they returned is known, and so the forward is run again, outside
of compiled graphs (``one_more_forward.py``). All ranks find the same layer, or stop together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sophia.checks import SophiaWarning
from sophia.distributed.collectives import Ranks
from sophia.refresh.counted import mask_from_labels
from sophia.refresh.loss_graph import LossGraph
from sophia.refresh.one_more_forward import Empty, Finding, came_by_loss_alone, made_of, nothing_counts
from sophia.refresh.output_layer import BeforeTheHead, Form, output_layers
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Outputs, Recording

__all__ = ["find_unseen"]


def find_unseen(recorder: Recorder, recordings: Sequence[Recording], ranks: Ranks) -> None:
    """Find the outputs of recordings that have none, or such as the likelihood cannot be about.

    All ranks call it together. Where their forwards wait for each other, what one has to find all look for;
    and one in which nothing counts takes the layer that another has found.

    Raises:
        RuntimeError: on all ranks, if on one there are predictions that are not to be found.
    """
    for recording in recordings:
        _leave_out_what_is_no_loss(recorder, recording)
    _look_once_more(recorder, recordings, ranks)
    for recording in recordings:  # those that came of that, too
        _leave_out_what_is_no_loss(recorder, recording)
        if recording.other_losses:
            _say_once(recorder, "other losses", _beside(recorder, recording.other_losses))


def _look_once_more(recorder: Recorder, recordings: Sequence[Recording], ranks: Ranks) -> None:
    wanted = ranks.together(lambda: [_is_wanted(recorder, recording) for recording in recordings])
    if ranks.lockstep:
        wanted = ranks.any_of(*wanted)
    if not ranks.any_of(any(wanted))[0]:
        return
    error: Exception | None = None
    empty: list[Empty] = []
    for recording, here in zip(recordings, wanted, strict=True):
        if not here:
            continue
        finding = Finding(recorder, recording, ranks)
        try:
            words = finding.run()
        except Exception as raised:
            if ranks.lockstep:
                raise  # the others are not here: they wait inside a forward
            error = error or raised
        else:
            # Raised when the others have come as far.
            error = error or (RuntimeError(words) if words else None)
            empty += finding.empty
    ranks.agree(error)
    _take_over(recorder, empty, ranks)


def _leave_out_what_is_no_loss(recorder: Recorder, recording: Recording) -> None:
    """Keep of several softmaxes in a loss those whose weights could be read, if any: the others are of a
    penalty (a router's entropy), of which is spoken, or of a number that is only looked at.
    """
    source, parts = recording.source, recording.outputs
    if not isinstance(source, LossGraph) or source.kept is not None or len(parts) < 2:
        return
    kept = [i for i, p in enumerate(parts) if p.mask is not None and p.weights is not None and not p.unread]
    if kept and len(kept) < len(parts) and len({parts[i].shape[-1] for i in kept}) == 1:
        left = [p for i, p in enumerate(parts) if i not in kept and p.mask is not None and bool(p.mask.any())]
        if left:
            _say_once(recorder, "softmax", _left_out(recorder, left[0]))
        recording.outputs = tuple(parts[i] for i in kept)
        recording.source = LossGraph(source.head, tuple(kept))


def _say_once(recorder: Recorder, key: str, message: str) -> None:
    if key not in recorder.guessed:
        recorder.guessed.add(key)
        warnings.warn(message, SophiaWarning)


def _left_out(recorder: Recorder, part: Outputs) -> str:
    because = f" ({part.problems[0].cause})" if part.problems else ""
    return (
        f"the loss of {type(recorder.model).__name__} has a softmax over {part.shape[-1]} classes, of shape "
        f"{tuple(part.shape)}, whose gradient is not that of a weighted cross-entropy{because}: h is without "
        "it. That is meant for a penalty (a router's entropy); if it is a loss of predictions, return the "
        "outputs and say what each is, likelihood=Heads({...}), or use estimator='hutchinson' for all of it"
    )


def _beside(recorder: Recorder, names: Sequence[str]) -> str:
    return (
        f"{type(recorder.model).__name__} makes a loss of another kind ({', '.join(names)}) beside that of "
        f"{type(recorder.heads[0].likelihood).__name__}(): h is without it. If it is one of predictions (a "
        "value head), return the outputs of both and say what each is, likelihood=Heads({...}); "
        "estimator='hutchinson' has all of the loss in it"
    )


def _is_wanted(recorder: Recorder, recording: Recording) -> bool:
    parts = recording.outputs
    return (
        bool(recording.arrived)
        or any(part.gradient is not None or part.unread_gradients for part in parts)
        or _is_of_another_loss(recorder, recording)
    )


def _is_of_another_loss(recorder: Recorder, recording: Recording) -> bool:
    """Whether no gradient reached the outputs, and the loss that the model returned is not the mean
    cross-entropy of the labels among its inputs.
    """
    if not came_by_loss_alone(recording) or recorder.named:
        return False
    labels = mask_from_labels(recorder, recording, recording.outputs[0])
    return labels is None or not recorder.loss_is_mean


class _Nowhere:
    """Where the predictions are if no step has yet had one that counts."""

    def seen(self) -> AbstractContextManager[None]:
        return nullcontext()

    def find(self, output: Any) -> tuple[Tensor, ...]:
        return (torch.zeros(0, 1),)


def _take_over(recorder: Recorder, empty: Sequence[Empty], ranks: Ranks) -> None:
    """Give recordings in which nothing counts the output that others have been found to have, on this rank
    or on another.
    """
    number = int(ranks.highest(-1 if recorder.layer is None else _number_of(recorder.layer)))
    if recorder.layer is None and empty and number >= 0:
        form, place = _form_and_place(number)
        maker = next((each.makers[form] for each in empty if form in each.makers), None)
        layer = replace(output_layers(recorder.model, form[-1])[place], in_lockstep=ranks.lockstep)
        recorder.layer = BeforeTheHead(recorder.model, layer, form, maker)
    for each in empty:
        if recorder.layer is not None and recorder.layer.form in each.shapes:
            made_of(recorder, each.recording, each.shapes[recorder.layer.form])
        elif not each.recording.outputs:
            part = Outputs(recorder.heads[0], torch.Size([0, 1]), True)
            part.mask = nothing_counts(recorder, (0,))
            each.recording.outputs, each.recording.source = (part,), _Nowhere()


def _number_of(found: BeforeTheHead) -> int:
    """A layer, and the form of its hidden states, as one number that is the same on all ranks."""
    of_module, dimensions, width = found.form
    layers = output_layers(found.model, width)
    same = [(layer.name, layer.scale, layer.cap) for layer in layers]
    place = same.index((found.layer.name, found.layer.scale, found.layer.cap))
    return ((width * 64 + dimensions) * 2 + of_module) * 64 + place


def _form_and_place(number: int) -> tuple[Form, int]:
    number, place = divmod(number, 64)
    number, of_module = divmod(number, 2)
    width, dimensions = divmod(number, 64)
    return (bool(of_module), dimensions, width), place
