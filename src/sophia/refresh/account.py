"""Account of a refresh: what was found in the recorded forwards, what was proved of them, what is assumed.

Plain numbers and words, for a report (``sophia doctor``). Made where somebody has asked for it alone: a
refresh that nobody looks at makes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia.refresh.cuts import Cuts
from sophia.refresh.model_outputs import labels_mask
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Outputs, Recording
from sophia.refresh.replay import Choice, are_read, usable

__all__ = ["Account", "OfOutput", "OfRepetition", "OfRows", "account_of", "outputs_in"]


@dataclass(frozen=True)
class OfOutput:
    """One output of the model that counts in h."""

    name: str
    """As one writes it."""
    head: str
    """That it belongs to."""
    likelihood: str
    """Whose labels are drawn for it."""
    shape: tuple[int, ...]
    """Of one micro-batch."""
    joined: bool
    """Whether it is there because the loss used it beside the first one."""
    predictions: int
    """In all micro-batches of the step."""
    counted: int | None
    """How many of them enter the loss; None where it is not told by a gradient or a mask."""
    known_by: str
    """"gradient", "mask_fn", "labels", "nothing" (all count), or "left out" by the loss of this step."""
    fit: float | None
    """Share of the predictions that count whose gradient is that of the likelihood's loss; None where not
    asked, as any gradient fits some target or weight.
    """
    weights: tuple[float, float, float] | None
    """What a prediction weighs in the loss, the least and the most, and the sum of all; None where it was
    not read, and is 1 / B.
    """


@dataclass(frozen=True)
class OfRows:
    """Whether parts of a micro-batch may be run alone."""

    what: str
    """"rows", or "documents" or "tokens" of a single one."""
    dim: int
    """Dimension of the outputs along which they lie."""
    number: int
    """How many there are; 0 where micro-batches are run whole."""
    taken: int
    """How many of them a refresh runs."""
    whole: str
    """Why micro-batches are run whole; empty where they are not."""
    dependent: bool
    """Whether it is because a run has shown that the rows depend on each other."""
    words: str = ""
    """What was said of that as a warning: it is a matter of cost, h is right."""


@dataclass(frozen=True)
class OfRepetition:
    """Whether the forward that a refresh runs is the one of the training."""

    proved: int
    """Kinds of input for which it was run again, and gave the same."""
    differences: tuple[str, ...]
    """What was different, for kinds of input for which it did not."""
    unproved: str
    """Why it was not tried; empty where it was."""
    moving: int
    """Modules that move state in a forward, which is put back."""
    written: int
    """Parameters that were written to between the forward and the step."""


@dataclass(frozen=True)
class Account:
    """What one refresh has found."""

    outputs: tuple[OfOutput, ...]
    rows: OfRows
    repetition: OfRepetition
    micro_batches: int
    """Of the step."""
    taken: int
    """How many of them were run again, whole or in part."""
    share: float
    """Predictions that the refresh ran, over those of the step."""
    gradient_scale: float
    """Of ``.grad``, in units of the loss that h is the curvature of; 0 if it is no one number."""
    needs_outputs: bool
    """Whether labels are drawn; else the estimator takes the loss as it is."""


def account_of(
    recorder: Recorder,
    cuts: Cuts,
    choice: Choice,
    parameters: Sequence[Tensor],
    *,
    share: float,
    gradient_scale: float,
    needs_outputs: bool,
) -> Account:
    """The account of a refresh whose recordings are still there."""
    return Account(
        outputs_in(recorder),
        _rows(recorder, cuts, choice.micro_batches),
        _repetition(recorder, parameters),
        choice.micro_batches,
        len(choice.replays),
        share,
        gradient_scale,
        needs_outputs,
    )


def outputs_in(recorder: Recorder) -> tuple[OfOutput, ...]:
    """What is known of the outputs once the backward has come through, before or after the step."""
    recordings = usable(recorder)
    read = dict(zip(recorder.heads, are_read(recorder, recordings), strict=True))
    alike: dict[tuple[str, object], list[tuple[Recording, Outputs]]] = {}
    for recording in recordings:
        for part in recording.outputs:
            alike.setdefault((part.head.name, part.place), []).append((recording, part))
    return tuple(_output(recorder, of_one, read[of_one[0][1].head]) for of_one in alike.values())


def _output(recorder: Recorder, of_one: Sequence[tuple[Recording, Outputs]], read: bool) -> OfOutput:
    recording, first = of_one[0]
    parts = [part for _, part in of_one]
    masks = [part.mask for part in parts if part.mask is not None]
    fits = [part.fit for part in parts if part.fit is not None]
    weights = [p.weights[_counting(p)] for p in parts if p.weights is not None]
    every = torch.cat([each.reshape(-1) for each in weights]) if weights and read else torch.zeros(0)
    if recorder.named:
        name = first.head.name
    elif recorder.logits_fn is not None:
        name = "logits_fn(output)"
    else:
        name = first.name or recording.name
    return OfOutput(
        name,
        first.head.name,
        type(first.head.likelihood).__name__,
        tuple(first.shape),
        first.place is not None,
        sum(part.prediction_shape.numel() for part in parts),
        sum(int(mask.sum()) for mask in masks) if masks else None,
        _known_by(recorder, recording, first, bool(masks)),
        min(fits) if fits else None,
        (float(every.min()), float(every.max()), float(every.sum())) if every.numel() else None,
    )


def _counting(part: Outputs) -> Tensor:
    """Which predictions count, of an output whose weights are known."""
    assert part.weights is not None
    return part.weights > 0 if part.mask is None else part.mask


def _known_by(recorder: Recorder, recording: Recording, part: Outputs, masked: bool) -> str:
    if recorder.mask_fn is not None:
        return "mask_fn"
    if masked:
        return "gradient"
    if part.returned and any(other.mask is not None for other in recording.outputs):
        return "left out"
    shape, classes = part.prediction_shape, part.shape[-1] if part.shape else 0
    labels = (
        labels_mask(recording.args, recording.kwargs, shape, classes, shift=0)
        if part.head.likelihood.event_dims == 1 and len(shape) >= 1
        else None
    )
    return "nothing" if labels is None else "labels"


def _rows(recorder: Recorder, cuts: Cuts, micro_batches: int) -> OfRows:
    division, shapes = cuts.last, [part.prediction_shape for part in usable(recorder)[0].outputs]
    single = all(shape[:1] == (1,) for shape in shapes)
    if division is not None:
        what = "documents" if division.starts is not None else "tokens" if single else "rows"
        taken = division.to_take(cuts.fraction) or division.number
        return OfRows(what, division.dim, division.number, taken, "", False)
    against = None
    if cuts.fraction >= 1:
        whole = "fraction=1.0 says so"
    elif micro_batches > 1:
        whole = "whole ones are run where there are several, which needs no proof of their rows"
    elif (against := cuts.against()) is not None:
        whole = against
    elif not shapes:
        whole = "it returns its loss alone"
    elif single:
        whole = "it is one row, and no input tells documents in it"
    else:
        whole = "its outputs have no dimension in common that holds more than one row"
    return OfRows("tokens" if single and shapes else "rows", 0, 0, 0, whole, against is not None, cuts.words)


def _repetition(recorder: Recorder, parameters: Sequence[Tensor]) -> OfRepetition:
    witnesses, recordings = recorder.witnesses, usable(recorder)
    reasons = list(witnesses.proved.values())
    unproved = ""
    if not reasons:
        unproved = witnesses.unproved(recordings[0].conditions)
    return OfRepetition(
        sum(reason is None for reason in reasons),
        tuple(reason for reason in reasons if reason is not None),
        unproved,
        len(witnesses.moving),
        max(recording.conditions.written(parameters) for recording in recordings),
    )
