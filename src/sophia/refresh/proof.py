"""Proof that a recorded forward can be run again: the same inputs, weights, state and random numbers give the
same outputs. One forward, once for each kind of input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sophia.distributed.collectives import Ranks
from sophia.refresh.conditions import sampled
from sophia.refresh.independence import TOLERANCE
from sophia.refresh.model_outputs import tensors_in
from sophia.refresh.moved_state import same_state
from sophia.refresh.places import fields
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Recording
from sophia.refresh.replay import usable

__all__ = ["prove"]


def prove(recorder: Recorder, parameters: Sequence[Tensor], ranks: Ranks) -> Iterator[tuple[str, str]]:
    """What is to be said of a repetition that is not the forward recorded, by a word for its kind.

    Runs as many forwards on all ranks.
    """
    recordings, name = usable(recorder), type(recorder.model).__name__
    # Of ours alone: another optimizer may have stepped before this one.
    if written := max(recording.conditions.written(parameters) for recording in recordings):
        yield "written", _written_since(name, written, len(parameters))
    while True:
        unproved = _to_prove(recorder, recordings)
        if not ranks.any_of(unproved is not None)[0]:
            return
        run = recordings[0] if unproved is None else unproved
        # With forwards in lockstep all ranks run one, whatever is left to prove on this one; and none can
        # leave the others alone in it.
        if ranks.lockstep:
            reason = _difference(recorder, run)
        else:
            reason = ranks.together(partial(_proved, recorder, unproved))
        if reason is not None:
            yield "another function", _another_function(name, reason)


def _proved(recorder: Recorder, recording: Recording | None) -> str | None:
    return None if recording is None else _difference(recorder, recording)


def _to_prove(recorder: Recorder, recordings: Sequence[Recording]) -> Recording | None:
    """The first of them that has still to be proved and can be: its weights are those that it was run with.

    Where another optimizer has stepped before this one, nothing can be told from a difference.
    """
    witnesses = recorder.witnesses
    for recording in recordings:
        witness = recording.conditions.witness
        unknown = witness is not None and witness.form not in witnesses.proved
        if unknown and witnesses.same_weights(recording.conditions):
            return recording
    return None


def _difference(recorder: Recorder, recording: Recording) -> str | None:
    """How the outputs of a repetition differ from those recorded; None if they do not."""
    witness = recording.conditions.witness
    # With gradients on, as in the training: compiled graphs draw the same random numbers then.
    with same_state(recorder.model, moving=recorder.witnesses.moving), torch.enable_grad():
        recording.conditions.begin_again(recorder.model)
        if witness is not None:
            witness.noise.restore()
        with recording.autocast.again():
            output = recorder.model(*recording.args, **recording.kwargs)
        found = sampled(tensors_in(fields(output)))
        del output
    if witness is None:
        return None  # run because another rank must
    reason = _gap(found, witness.outputs)
    recorder.witnesses.proved[witness.form] = reason
    return reason


def _gap(
    found: Sequence[tuple[torch.Size, Tensor]], recorded: Sequence[tuple[torch.Size, Tensor]]
) -> str | None:
    for (shape, now), (before, then) in zip(found, recorded, strict=False):
        if shape != before or not then.numel() or not bool(then.isfinite().all()):
            continue  # nothing can be told; the pass itself will say so
        size, gap = float(then.abs().max()), float((now - then).abs().max())
        # A wrapper's hook may cast what the model returns after it was noted (mixed precision of FSDP2).
        if not gap <= max(TOLERANCE.get(t.dtype, 1e-3) for t in (now, then)) * size:
            return f"its outputs differ by {gap:.2g} from those of the training, of size {size:.2g}"
    return None


def _another_function(name: str, reason: str) -> str:
    return (
        f"a forward of {name} that was run again on the same inputs, weights and random numbers is not the "
        f"same function ({reason}): it depends on state that is neither a buffer, a parameter nor a plain "
        "attribute of a module (an object, a global, a generator of its own). h is the curvature of what it "
        "does now. Keep that state in a buffer, or use mode='manual' with opt.hessian_pass() if it matters"
    )


def _written_since(name: str, number: int, every: int) -> str:
    return (
        f"{number} of {every} parameters of {name} were written to between its forward and step(): a refresh "
        "runs the forward again with the weights of now, so h is the curvature at another point than the "
        "gradient's. After a small move (clipped weights, a sharpness-aware step) that hardly matters; after "
        "a large one use mode='manual' and open opt.hessian_pass() where the forward is run"
    )
