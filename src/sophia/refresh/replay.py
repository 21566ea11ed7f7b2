"""Replay of recorded forwards: which of them, which rows, and what counts.

Whole micro-batches are taken first, as that costs no recompilation; with a single one, a part of its rows.
The predictions that count are known before the pass, so their number B is too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia.checks import SophiaWarning
from sophia.curvature.last_layer import Readout, watched
from sophia.refresh.eager import eager
from sophia.refresh.model_outputs import find_loss, labels_mask, mean_loss, shift_by_loss, shift_by_name
from sophia.refresh.recorder import Outputs, Recorder, Recording
from sophia.refresh.seeds import generator

__all__ = ["Replay", "RowsCannotBeTaken", "choose"]


class RowsCannotBeTaken(Exception):
    """The model does not run on a part of the rows of its inputs."""


@dataclass(frozen=True)
class Replay:
    """A recorded forward, or the first rows of it, as an estimator sees it (``curvature.MicroBatch``)."""

    recorder: Recorder
    recording: Recording
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    masks: tuple[Tensor, ...]
    counts: tuple[int, ...]
    key: tuple[int | str, ...]
    rows: int | None

    @property
    def mask(self) -> Tensor:
        """Which predictions of the (first) output count."""
        return self.masks[0]

    @property
    def count(self) -> int:
        """How many predictions count, over all heads."""
        return sum(self.counts)

    def forward(self) -> Any:
        """Run the model on the recorded inputs, under the recorded autocast."""
        if self.rows is None:
            with self.recording.autocast.again():
                return self.recorder.model(*self.args, **self.kwargs)
        try:
            with self.recording.autocast.again(), eager():
                output = self.recorder.model(*self.args, **self.kwargs)
            found = self.recorder.find_outputs(output)
            fits = all(t.shape[: m.ndim] == m.shape for t, m in zip(found, self.masks, strict=True))
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
        found = self.recorder.find_outputs(output)
        return output, tuple(next((call for made, call in calls if made is each), None) for each in found)

    def outputs(self, output: Any) -> tuple[Tensor, ...]:
        """The outputs of all heads, checked against those of the training forward."""
        found = self.recorder.find_outputs(output)
        for tensor, recorded in zip(found, self.recording.outputs, strict=True):
            rows = recorded.shape[:1] if self.rows is None else (self.rows,)
            expected = (*rows, *recorded.shape[1:])
            if tuple(tensor.shape) != expected:
                raise RuntimeError(
                    f"replay gave logits of shape {tuple(tensor.shape)} but training gave {expected}: the "
                    "model's output depends on more than its inputs, so its forward cannot be repeated. "
                    "Use mode='manual' and opt.hessian_pass()"
                )
        return found

    def logits(self, output: Any) -> Tensor:
        """The (first) output."""
        return self.outputs(output)[0]

    def loss(self, output: Any) -> Tensor:
        """The mean training loss over the counted predictions, from the output."""
        return mean_loss(output, self.kwargs, self.count)

    def generator(self, purpose: str) -> torch.Generator:
        """Noise of this micro-batch alone."""
        return generator(self.mask.device, *self.key, purpose)


def choose(
    recorder: Recorder, *, fraction: float, key: tuple[int | str, ...], least_rows: int | None
) -> list[Replay]:
    """The part of the recordings that a refresh runs again.

    Args:
        recorder: holds the recordings since the last step.
        fraction: of the micro-batches, rounded up; of the rows if there is one micro-batch only.
        key: (seed, step, rank), from which the noise of each micro-batch is made.
        least_rows: fewest rows to take of a single micro-batch; None for all of them.
    """
    recordings = recorder.recordings
    # Where a backward came through some, the others never entered the loss (a validation without eval()).
    if any(recording.reached for recording in recordings):
        recordings = [recording for recording in recordings if recording.reached]
    if any(recording.overwritten() for recording in recordings):
        raise RuntimeError(
            "an input tensor was modified in place between forward and step(), so the forward cannot be "
            "repeated on what it saw; "
            "pass copy_inputs=True"
        )
    # Less 1e-9: 1/3 of three is one, not two.
    single = len(recordings) == 1
    recordings = recordings[: max(1, math.ceil(fraction * len(recordings) - 1e-9))]
    rows: int | None = None
    if fraction < 1 and single and least_rows is not None:
        batch = _batch(recordings[0])
        rows = max(least_rows, int(fraction * batch)) if batch > least_rows else None
    return [_replay(recorder, recording, rows, (*key, micro)) for micro, recording in enumerate(recordings)]


def _batch(recording: Recording) -> int:
    """The number of rows, 0 if the heads do not agree on one: then they cannot be cut alike."""
    sizes = {part.shape[0] if part.prediction_shape else 0 for part in recording.outputs}
    return sizes.pop() if len(sizes) == 1 else 0


def _replay(recorder: Recorder, recording: Recording, rows: int | None, key: tuple[int | str, ...]) -> Replay:
    masks = tuple(_mask(recorder, recording, part) for part in recording.outputs)
    args, kwargs = recording.args, recording.kwargs
    if rows is not None:
        batch = _batch(recording)
        args, kwargs = _first(args, rows, batch), _first(dict(kwargs), rows, batch)
        masks = tuple(mask[:rows] for mask in masks)
    # Inputs that come out of a graph (an encoder's states) are leaves here: that graph is gone, or is not
    # ours to enter.
    args, kwargs = _detached(args), _detached(dict(kwargs))
    counts = tuple(int(mask.sum()) for mask in masks)
    return Replay(recorder, recording, args, kwargs, masks, counts, key, rows)


def _mask(recorder: Recorder, recording: Recording, part: Outputs) -> Tensor:
    shape = part.prediction_shape
    if part.mask is not None:
        if part.mask.shape != shape or part.mask.dtype != torch.bool:
            raise RuntimeError(
                f"mask_fn returned {part.mask.dtype} of shape {tuple(part.mask.shape)}, but the "
                f"predictions have shape {tuple(shape)}: return a bool mask of that shape"
            )
        return part.mask
    device = next(recorder.model.parameters()).device
    if part.returned and any(other.mask is not None for other in recording.outputs):
        # The loss of this step left the head out, as its own output would have got a gradient.
        return torch.zeros(shape, dtype=torch.bool, device=device)
    mask = _mask_from_labels(recorder, recording, part)
    if mask is not None:
        return mask
    where = "the logits" if len(recording.outputs) == 1 else f"the head {part.head.name!r}"
    warnings.warn(
        f"no gradient reached {where} and no labels were found among the inputs: counting every position. "
        "If some are padding, B is too large; pass mask_fn=",
        SophiaWarning,
    )
    return torch.ones(shape, dtype=torch.bool, device=device)


def _mask_from_labels(recorder: Recorder, recording: Recording, part: Outputs) -> Tensor | None:
    shape = part.prediction_shape
    classifiers = [head for head in recorder.heads if head.likelihood.event_dims == 1]
    # With two of them it would be a guess whose labels these are.
    if classifiers != [part.head] or len(shape) < 1:
        return None
    args, kwargs, classes = recording.args, recording.kwargs, part.shape[-1]
    if labels_mask(args, kwargs, shape, classes, shift=0) is None:
        return None
    if recorder.label_shift is None and len(shape) == 2:
        # Once per model: one more forward tells whether the model shifts its labels itself. With gradients
        # on, as without them a compiled model would compile again.
        with recording.autocast.again():
            output = recorder.model(*args, **kwargs)
        logits = recorder.find_outputs(output)[recorder.heads.index(part.head)]
        by_loss = shift_by_loss(args, kwargs, logits.detach(), find_loss(output))
        recorder.label_shift = shift_by_name(recorder.model) if by_loss is None else by_loss
    return labels_mask(args, kwargs, shape, classes, shift=recorder.label_shift or 0)


def _first(value: Any, rows: int, batch: int) -> Any:
    """The first rows of every tensor that has as many as the batch; views, not copies."""
    if isinstance(value, Tensor):
        return value[:rows] if value.ndim and value.shape[0] == batch else value
    return _mapped(value, lambda item: _first(item, rows, batch))


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return _mapped(value, _detached)


def _mapped(value: Any, function: Any) -> Any:
    if type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(function(item) for item in value)
    return value
