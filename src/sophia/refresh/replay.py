"""Replay of recorded forwards: which of them, which rows, and what counts.

Whole micro-batches are taken where there are several, as that costs no proof; of a single one, a part of its
rows, where they are independent (``cuts.py``). The predictions that count are known before the pass, so their
number B is too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia.curvature.last_layer import Readout, watched
from sophia.refresh.counted import mask_of
from sophia.refresh.division import Division
from sophia.refresh.eager import eager
from sophia.refresh.loss_graph import backward
from sophia.refresh.model_outputs import items_of_part, mean_loss
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Recording, trained
from sophia.refresh.seeds import generator

__all__ = ["Choice", "Replay", "RowsCannotBeTaken", "are_read", "choose", "detached", "usable"]


class RowsCannotBeTaken(Exception):
    """The model does not run on a part of the rows of its inputs."""


@dataclass(frozen=True)
class Replay:
    """A recorded forward, or some rows of it, as an estimator sees it (``curvature.MicroBatch``)."""

    recorder: Recorder
    recording: Recording
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    masks: tuple[Tensor, ...]
    """Which predictions of each output count."""
    heads: tuple[int, ...]
    """The number of the head that each output is of."""
    counts: tuple[int, ...]
    """How many predictions of each head count."""
    key: tuple[int | str, ...]
    cut: tuple[Division, Tensor] | None
    """The places that were taken, ``(n,)``, and along what; None for the whole."""
    weights: tuple[Tensor | None, ...]
    """What each prediction of an output weighs in the loss, of the shape of its mask; None where it is 1 / B
    of its head.
    """
    stated: tuple[Tensor | None, ...]
    """What each weighs in a mean, where the user has said it."""
    share: float
    """What this part stands for: what counts in the step over what counts here, in micro-batches or in rows.
    An estimate from the part, times it, is unbiased for the whole.
    """
    whole: int
    """How many predictions count in all rows of this micro-batch, over all heads."""

    @property
    def mask(self) -> Tensor:
        """Which predictions of the (first) output count."""
        return self.masks[0]

    @property
    def count(self) -> int:
        """How many predictions count, over all heads."""
        return sum(self.counts)

    def forward(self) -> Any:
        """Run the model on the recorded inputs, under the recorded autocast, from the recorded state."""
        self.recording.conditions.begin_again(self.recorder.model)
        if self.cut is None:
            with self.recording.autocast.again(), self.recording.seen():
                return self.recorder.model(*self.args, **self.kwargs)
        try:
            with self.recording.autocast.again(), eager(), self.recording.seen():
                output = self.recorder.model(*self.args, **self.kwargs)
            found = self.recorder.outputs_of(self.recording, output)
            fits = all(
                t is not None and t.shape[: m.ndim] == m.shape for t, m in zip(found, self.masks, strict=True)
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RowsCannotBeTaken(f"{type(error).__name__}: {error}") from error
        if not fits:
            raise RowsCannotBeTaken("the logits do not have the rows that were asked for")
        return output

    def forward_with_readouts(self) -> tuple[Any, tuple[Readout | None, ...]]:
        """``forward()``, and for each output the call of the linear layer that made it, if it was seen."""
        classes = {outputs.shape[-1] for outputs in self.recording.outputs if outputs.shape}
        with watched(self.recorder.model, classes) as calls:
            output = self.forward()
        found = self.recorder.outputs_of(self.recording, output)
        return output, tuple(next((call for made, call in calls if made is each), None) for each in found)

    def outputs(self, output: Any) -> tuple[Tensor, ...]:
        """The outputs of all heads, checked against those of the training forward."""
        found = self.recorder.outputs_of(self.recording, output)
        for tensor, recorded in zip(found, self.recording.outputs, strict=True):
            shape = list(recorded.shape)
            if self.cut is not None:
                division, places = self.cut
                shape[division.dim] = len(places)
            got = None if tensor is None else list(tensor.shape)
            if got != shape:
                raise RuntimeError(
                    f"replay gave logits of shape {got and tuple(got)} but training gave {tuple(shape)}: "
                    "the model's output depends on more than its inputs, so its forward cannot be repeated. "
                    "Use mode='manual' and opt.hessian_pass()"
                )
        return found

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Propagate gradients in some of the outputs."""
        backward(roots, gradients)

    def logits(self, output: Any) -> Tensor:
        """The (first) output."""
        return self.outputs(output)[0]

    def loss(self, output: Any) -> Tensor:
        """The mean training loss over the counted predictions, from the output."""
        # The loss of a part stands for that of the whole micro-batch: items_of_part.
        # A loss that came alone is taken as it is: what it was divided by is not known.
        return mean_loss(output, self.recording.kwargs if self.masks else {}, self.whole)

    def generator(self, purpose: str) -> torch.Generator:
        """Noise of this micro-batch alone."""
        device = (self.masks or tuple(self.recorder.model.parameters()))[0].device
        return generator(device, *self.key, purpose)


@dataclass(frozen=True)
class Choice:
    """The part of a step's forwards that a refresh runs again."""

    replays: list[Replay]
    totals: tuple[int, ...]
    """Predictions that count in the whole step of this process, head by head."""
    weights: tuple[float | None, ...]
    """The sum of their weights in the loss, head by head; None where they were not read."""
    micro_batches: int = 1
    """Forwards of the whole step."""


def choose(
    recorder: Recorder, *, fraction: float, key: tuple[int | str, ...], division: Division | None
) -> Choice:
    """Draw the part of the recordings that a refresh runs again.

    Drawn by the noise of ``key``, among those in which something counts: the first ones are no sample where
    data come in an order (real before generated, positive before negative, chosen before rejected).

    Args:
        recorder: holds the recordings since the last step.
        fraction: of the micro-batches, rounded up; of the rows if there is one micro-batch only.
        key: (seed, step, rank), from which the choice and the noise of each micro-batch are made.
        division: of a single micro-batch into parts that are independent; None to run it whole.
    """
    recordings = usable(recorder)
    masks = [tuple(mask_of(recorder, r, part) for part in r.outputs) for r in recordings]
    read = are_read(recorder, recordings)
    counts = [_by_head(recorder, r, of_one) for r, of_one in zip(recordings, masks, strict=True)]
    totals = tuple(map(sum, zip(*counts, strict=True)))
    if len(recordings) > 1:
        # Less 1e-9: 1/3 of three is one, not two.
        number = max(1, math.ceil(fraction * len(recordings) - 1e-9))
        counting = [any(of_one) for of_one in counts]
        chosen, share = _drawn(counting, number, (*key, "micro-batches"))
        taken = [_replay(recorder, recordings[i], masks[i], None, read, share, (*key, i)) for i in chosen]
        return Choice(taken, totals, _sums(recorder, recordings, read), len(recordings))
    (recording,), (of_one,) = recordings, masks
    cut, share = None, 1.0
    if division is not None and (number_of_parts := division.to_take(fraction)) is not None:
        parts, share = _drawn(division.counting(of_one), number_of_parts, (*key, 0, "rows"))
        cut = division, division.places(parts)
    taken = [_replay(recorder, recording, of_one, cut, read, share, (*key, 0))]
    return Choice(taken, totals, _sums(recorder, recordings, read))


def _by_head(recorder: Recorder, recording: Recording, masks: Sequence[Tensor]) -> tuple[int, ...]:
    """How many predictions of each head count; a model that returns its loss alone counts as one."""
    counts = {head.name: 0 for head in recorder.heads}
    for part, mask in zip(recording.outputs, masks, strict=True):
        counts[part.head.name] += int(mask.sum())
    if not recording.outputs:
        counts[recorder.heads[0].name] = 1
    return tuple(counts.values())


def are_read(recorder: Recorder, recordings: Sequence[Recording]) -> tuple[bool, ...]:
    """Head by head, whether the weights of all predictions that count were read."""
    heads = [[p for r in recordings for p in r.outputs if p.head is head] for head in recorder.heads]
    return tuple(
        all(p.weights is not None and not p.unread for p in of_head if p.mask is not None or p.by_labels)
        and any(part.weights is not None for part in of_head)
        for of_head in heads
    )


def _sums(
    recorder: Recorder, recordings: Sequence[Recording], read: tuple[bool, ...]
) -> tuple[float | None, ...]:
    """The sum of all weights of the step, head by head; None where they were not read."""
    heads = [[p.weights for r in recordings for p in r.outputs if p.head is h] for h in recorder.heads]
    return tuple(
        sum(float(weights.sum()) for weights in of_head if weights is not None) if known else None
        for of_head, known in zip(heads, read, strict=True)
    )


def usable(recorder: Recorder) -> list[Recording]:
    """The recordings that entered the loss. Raises RuntimeError if one of them cannot be repeated."""
    recordings = trained(recorder.recordings)
    for recording in recordings:
        if recording.refused is not None:
            raise recording.refused
    if any(recording.overwritten() for recording in recordings):
        raise RuntimeError(
            "an input tensor was modified in place between forward and step(), so the forward cannot be "
            "repeated on what it saw; "
            "pass copy_inputs=True"
        )
    return recordings


def _drawn(counting: list[bool], number: int, key: tuple[int | str, ...]) -> tuple[list[int], float]:
    """``number`` places, those that count first, and what each stands for.

    The number does not depend on what counts: every rank runs as many forwards, of the same shape.
    """
    order = torch.randperm(len(counting), generator=generator(torch.device("cpu"), *key)).tolist()
    counted = [place for place in order if counting[place]]
    chosen = [*counted, *(place for place in order if not counting[place])][:number]
    share = len(counted) / min(number, len(counted)) if counted else 1.0
    return sorted(chosen), share


def _replay(
    recorder: Recorder,
    recording: Recording,
    masks: tuple[Tensor, ...],
    cut: tuple[Division, Tensor] | None,
    read: tuple[bool, ...],
    share: float,
    key: tuple[int | str, ...],
) -> Replay:
    args, kwargs = recording.args, dict(recording.kwargs)
    names = [head.name for head in recorder.heads]
    heads = tuple(names.index(part.head.name) for part in recording.outputs)
    parts = zip(recording.outputs, masks, heads, strict=True)
    weights = tuple(
        (torch.zeros_like(mask, dtype=torch.float32) if part.weights is None else part.weights)
        if read[head]
        else None
        for part, mask, head in parts
    )
    stated = tuple(part.stated for part in recording.outputs)
    whole = sum(_by_head(recorder, recording, masks))
    if cut is not None:
        division, places = cut
        args, kwargs = division.of_inputs(args, places), division.of_inputs(kwargs, places)
        masks = tuple(division.of_output(mask, places) for mask in masks)
        weights = tuple(None if w is None else division.of_output(w, places) for w in weights)
        stated = tuple(None if w is None else division.of_output(w, places) for w in stated)
    # Inputs that come out of a graph (an encoder's states) are leaves here: that graph is gone, or is not
    # ours to enter.
    args, kwargs = detached(args), detached(kwargs)
    counts = _by_head(recorder, recording, masks)
    kwargs = items_of_part(kwargs, sum(counts), whole) if cut is not None else kwargs
    return Replay(
        recorder, recording, args, kwargs, masks, heads, counts, key, cut, weights, stated, share, whole
    )


def detached(value: Any) -> Any:
    """Inputs as leaves of no graph."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return _mapped(value, detached)


def _mapped(value: Any, function: Any) -> Any:
    if type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(function(item) for item in value)
    return value
