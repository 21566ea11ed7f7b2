"""Cuts of a single micro-batch: made where a run has shown that its parts are independent.

Asked of the model once for each kind of input, at the cost of two forwards, or three where
the first dimension does not hold the rows. All ranks decide alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.checks import SophiaWarning
from sophia.distributed.collectives import Ranks
from sophia.distributed.wrappers import reshard
from sophia.refresh.division import Division, divisions_of
from sophia.refresh.independence import awake, difference, held_still, kind_of_inputs
from sophia.refresh.moved_state import same_state
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Recording
from sophia.refresh.replay import RowsCannotBeTaken, usable
from sophia.refresh.seeds import generator

__all__ = ["Cuts"]

_MOST = 2  # divisions that are tried


class Cuts:
    """Which kinds of input may be cut, and how.

    Args:
        fraction: of the parts, that a refresh runs.
        batch_dim: dimension of the rows in the outputs; None to find it.
    """

    def __init__(self, *, fraction: float, batch_dim: int | None) -> None:
        self.fraction, self.batch_dim = fraction, batch_dim
        self.proved: dict[Hashable, int | None] = {}
        """By kind of input, the number of the division whose parts are independent; None where none is."""
        self.reasons: dict[Hashable, str] = {}
        """Why it is None, where a run has shown it."""
        self.last: Division | None = None
        """How the micro-batch of the last refresh was divided; None if it was run whole."""
        self.words = ""
        """What was said of micro-batches that are run whole."""
        self._kind: Hashable = None  # of the last input that was asked about
        self._said: set[str] = set()

    def division(self, recorder: Recorder, ranks: Ranks, key: tuple[int | str, ...]) -> Division | None:
        """How the recorded micro-batch may be cut; None if it is to be run whole. Call it in the sandbox."""
        recordings = usable(recorder)
        found: list[Division] = []
        if self.fraction < 1 and len(recordings) == 1:
            found = self._divisions(recordings[0])
        self._kind = self._kind_of(recorder, recordings[0], found) if found else None
        unknown = bool(found) and self._kind not in self.proved
        reasons: list[str] = []
        if ranks.any_of(unknown)[0]:
            reasons = self._prove(recorder, recordings[0], found, ranks, key)
        if self.fraction < 1 and len(recordings) == 1:
            self._say(recorder, recordings[0], reasons)
        place = self.proved.get(self._kind)
        self.last = None if place is None else found[place]
        return self.last

    def against(self) -> str | None:
        """Why the micro-batch of the last refresh was run whole, if a run has shown that its parts depend on
        each other.
        """
        return self.reasons.get(self._kind)

    def give_up(self, recorder: Recorder, reason: str) -> None:
        """Run inputs of the last kind whole from now on: their parts could not be run after all."""
        self.proved[self._kind] = self.last = None
        self.reasons[self._kind] = reason
        self._say(recorder, usable(recorder)[0], [reason])

    def _divisions(self, recording: Recording) -> list[Division]:
        shapes = [part.prediction_shape for part in recording.outputs]
        found = divisions_of(shapes, (recording.args, recording.kwargs), self.batch_dim)
        return [division for division in found if division.to_take(self.fraction) is not None]

    @staticmethod
    def _kind_of(recorder: Recorder, recording: Recording, divisions: Sequence[Division]) -> Hashable:
        lengths = (
            *((d.dim, d.starts is None, d.flattened and d.flattened[1]) for d in divisions),
            len(recording.outputs) > 1,
        )
        inputs = tuple(kind_of_inputs(recording.args, recording.kwargs, d.length) for d in divisions)
        return lengths, inputs, recording.conditions.evaluated

    def _prove(
        self,
        recorder: Recorder,
        recording: Recording,
        divisions: Sequence[Division],
        ranks: Ranks,
        key: tuple[int | str, ...],
    ) -> list[str]:
        """Find a division whose parts are independent on all ranks; returns what was against the others."""
        kind, reasons = self._kind, []
        unknown = bool(divisions) and kind not in self.proved
        before = self.proved.get(kind)
        self.proved[kind] = None
        # With forwards in lockstep all ranks must run as many, whatever is known on this one.
        runs = unknown or ranks.lockstep
        noise = generator(torch.device("cpu"), *key, "proof")
        with awake(recorder.model.parameters(), noise):
            forward = _Forward(recorder, recording, ranks)
            whole = held_still(forward.of_all) if runs else []
            for place in range(_MOST):
                division = divisions[place] if place < len(divisions) else None
                if not ranks.any_of(division is not None)[0]:
                    break
                reason = None
                if runs:
                    reason = self._dependence(forward, division, whole, noise)
                elif division is not None and before != place:
                    reason = "found earlier"
                reasons.append(reason or "on another rank")
                if not ranks.any_of(reason is not None)[0]:
                    self.proved[kind] = None if division is None else place
                    reasons = []
                    break
        if reasons:
            self.reasons[kind] = reasons[0]
        if runs:
            reshard(recorder.model)
        return reasons

    def _dependence(
        self, forward: _Forward, division: Division | None, whole: Sequence[Tensor], noise: torch.Generator
    ) -> str | None:
        if division is None:
            held_still(forward.of_all)
            return None
        # The middle part among them: under a recurrence over rows the first one alone would show nothing.
        middle = division.number // 2
        order = torch.randperm(division.number, generator=noise).tolist()
        order = [middle, *(part for part in order if part != middle)]
        places = division.places(sorted(order[: division.to_take(self.fraction)]))
        try:
            alone = held_still(lambda: forward.of_part(division, places))
        except RowsCannotBeTaken as reason:
            return str(reason)
        together = [division.of_output(tensor, places) for tensor in whole]
        return difference(together, alone)

    def _say(self, recorder: Recorder, recording: Recording, reasons: Sequence[str]) -> None:
        """Say once that refreshes run whole micro-batches, and what that costs."""
        shapes = [part.prediction_shape for part in recording.outputs]
        single = self.batch_dim is None and all(shape[:1] == (1,) for shape in shapes)
        what = "single row" if single else "rows"
        unsaid = (reasons or single) and what not in self._said and self.proved.get(self._kind) is None
        if not unsaid or sum(shape.numel() for shape in shapes) <= len(shapes):
            return
        self._said.add(what)
        name, times = type(recorder.model).__name__, round(1 / self.fraction)
        because = f" ({reasons[0]})" if reasons else ""
        cost = (
            f"so a refresh runs the whole of it, as a step does. An update_every {times} times as large "
            "costs what a part of it would; fraction=1.0 says that the whole is meant"
        )
        if single:
            self.words = (
                f"a step of {name} has one row, packed or not, and neither documents nor tokens of it that "
                f"could be run alone{because}, {cost}. Documents are found by position_ids that start anew"
            )
        else:
            self.words = (
                f"the rows of a batch of {name} are not independent{because}, {cost}. Where the rows lie "
                "along another dimension than the first two, pass batch_dim="
            )
        warnings.warn(self.words, SophiaWarning)


class _Forward:
    """The recorded forward, whole and in part, each from the same state: one that counts its calls is no
    dependence.
    """

    def __init__(self, recorder: Recorder, recording: Recording, ranks: Ranks) -> None:
        self._recorder, self._recording, self._ranks = recorder, recording, ranks

    def of_all(self) -> Sequence[Tensor]:
        return self._run(lambda value: value)

    def of_part(self, division: Division, places: Tensor) -> Sequence[Tensor]:
        try:
            return self._run(lambda value: division.of_inputs(value, places))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._ranks.lockstep:  # the others wait inside this forward
                raise RuntimeError(
                    f"{type(self._recorder.model).__name__} does not run on a part of the rows of its inputs "
                    f"({type(error).__name__}: {error}), and a sharded forward that was left half-way "
                    "cannot be begun again. Pass fraction=1.0: then a refresh takes the whole batch"
                ) from error
            raise RowsCannotBeTaken(f"{type(error).__name__}: {error}") from error

    def _run(self, part: Callable[[Any], Any]) -> Sequence[Tensor]:
        recorder, recording = self._recorder, self._recording
        same = same_state(recorder.model, moving=recorder.witnesses.moving)
        with recording.autocast.again(), recording.seen(), same:
            recording.conditions.begin_again(recorder.model)
            output = recorder.model(*part(recording.args), **part(dict(recording.kwargs)))
            return recorder.outputs_of(recording, output)
