"""Training loop of one run. No optimizer's name appears here: a contender is a row in a table."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sophia.lab.config import schedules
from sophia.lab.config.record_format import EndRow, EvaluationRow, TrainRow, zeros_of_curvature
from sophia.lab.config.run import Run
from sophia.lab.data.tokens import Tokens
from sophia.lab.models import build
from sophia.lab.optimizers import contender
from sophia.lab.support import provenance
from sophia.lab.support.errors import Stopped
from sophia.lab.support.files import locked
from sophia.lab.support.signals import Request
from sophia.lab.training import checkpoint, components
from sophia.lab.training.components import Components
from sophia.lab.training.fingerprint import provenance_of
from sophia.lab.training.position import Position
from sophia.lab.training.processes import Solo
from sophia.lab.training.run_folder import Record, Silent
from sophia.lab.training.trackers import Trackers

__all__ = ["Progress", "train"]


@dataclass(frozen=True)
class Progress:
    """Progress report of a run, sent at every row of its log."""

    step: int
    loss: float
    """Mean training loss since the last report, nats per token."""
    unclipped: float | None
    """Share of coordinates that move by less than lr, for optimizers that say so."""


def train(
    config: Run,
    runs: Path,
    tokens: Tokens,
    *,
    save_every: int = 100,
    stop: Request | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    team: Solo | None = None,
    recompute: bool = False,
    keep: bool = False,
    trackers: Trackers | None = None,
) -> EndRow:
    """Train, or go on from the last checkpoint, or do nothing if the run has ended; return its result.

    Leaves its records in ``runs/<hash>``. When ``stop`` is set it saves and raises ``Stopped``. With a
    ``team`` of several processes each of them calls it, on one folder, and the first writes. ``recompute``
    trades the activations of the blocks for a second forward; it changes no number. ``keep`` saves the
    trained model, as the last checkpoint. ``trackers`` get the rows of the log.
    """
    team = Solo() if team is None else team
    record = Record(runs, config) if team.rank == 0 else Silent(runs, config)
    if (result := record.result()) is not None:  # before the lock, which would make a folder for a packed run
        return result
    with locked(record.folder, what="run") if team.rank == 0 else contextlib.nullcontext():
        if (result := record.result()) is None:
            record.open()
            request = Request() if stop is None else stop  # a request that was not made yet is false
            trackers = trackers if trackers is not None and team.rank == 0 else Trackers()
            with trackers.follow(record):
                parts = components.components(config, tokens, team, recompute=recompute)
                result = _train(parts, record, tokens, save_every, request, report, keep)
                record.finish(result)
    return result


def _train(
    parts: Components,
    record: Record,
    tokens: Tokens,
    save_every: int,
    stop: Request,
    report: Callable[[Progress], None],
    keep: bool,
) -> EndRow:
    run, team, optimizer = parts.run, parts.team, parts.optimizer
    position = _resumed(parts, record)
    loss_at_end = math.nan
    if position.step == 0:
        _evaluate(parts, position, record)
    while position.step < run.steps:
        with position.clock:
            factor = schedules.factor(run.schedule, position.step, steps=run.steps)
            for group, peak in zip(optimizer.param_groups, parts.peaks, strict=True):
                group["lr"] = peak * factor
            context = run.model.context
            batch = tokens.batch(seed=run.seed, step=position.step, size=run.batch, context=context)
            loss, norm = components.gradients(parts, batch)
            # Asked before the step: a gradient that is not finite would stay in weights and averages.
            if finite := math.isfinite(loss) and math.isfinite(norm):
                if parts.contender.closure:
                    optimizer.step(functools.partial(_again, parts, batch))
                else:
                    optimizer.step()
                optimizer.zero_grad()
        if not finite:
            return _end(parts, position, record, "diverged", None)
        position.advance(loss, clipped=norm > parts.limit)

        last = position.step == run.steps
        if last or position.step % run.log_every == 0:
            row = _append_train_row(parts, position, record, norm)
            report(Progress(position.step, row["loss"], row.get("unclipped")))
        if last or position.step % run.evaluation.every == 0:
            loss_at_end = _evaluate(parts, position, record)
            if not math.isfinite(loss_at_end):
                return _end(parts, position, record, "diverged", None)
        # Every process asks at every step, since the answer is a sum over them.
        if team.agreed(bool(stop)) and not last:
            _save(parts, position, record)
            raise Stopped(
                f"Stopped at step {position.step} of {run.steps}; the state is saved.",
                signal=stop.signal or 0,
            )
        if position.step % save_every == 0 and not last:
            _save(parts, position, record)
    if keep:
        _save(parts, position, record)
    return _end(parts, position, record, "finished", loss_at_end)


def _again(parts: Components, batch: torch.Tensor) -> Any:
    """The closure of an optimizer that makes passes of its own: loss and gradients of the batch again."""
    with torch.enable_grad():
        parts.optimizer.zero_grad()
        return torch.tensor(components.gradients(parts, batch)[0])


def _resumed(parts: Components, record: Record) -> Position:
    """Load the last checkpoint, if there is one, and cut the log to the length that it knows."""
    state = parts.team.load(record.folder, parts.model, parts.optimizer)
    if state is not None:
        # After the model was built, whose initialisation draws from the same generators.
        checkpoint.restore_random_state(state["random"])
    position = Position() if state is None else Position.from_state(state)
    record.cut(0 if state is None else state["log"])
    record.attempt(from_step=position.step)
    return position


def _save(parts: Components, position: Position, record: Record) -> None:
    # The log goes to the disk first: a checkpoint that knew more rows than are there could not be resumed.
    log = record.sync()
    state = {"random": checkpoint.random_state(), "log": log, **position.to_state()}
    parts.team.save(record.folder, parts.model, parts.optimizer, state)


def _evaluate(parts: Components, position: Position, record: Record) -> float:
    loss = components.held_out_loss(parts)
    row: EvaluationRow = {
        "kind": "eval",
        "step": position.step,
        "loss": loss,
        "bits_per_byte": parts.bits_per_byte(loss),
    }
    record.append(row)
    return loss


def _append_train_row(parts: Components, position: Position, record: Record, norm: float) -> TrainRow:
    said: dict[str, Any] = parts.team.stats(parts.optimizer)
    zeros = zeros_of_curvature(said)
    numbers = {key: value for key, value in said.items() if key not in zeros}
    loss, clipped = position.means()
    row: TrainRow = {
        "kind": "train",
        "step": position.step,
        "loss": loss,
        "lr": parts.optimizer.param_groups[0]["lr"],
        "grad_norm": norm,
        "gradient_clipped": clipped,
        "tokens": position.step * parts.run.tokens_per_step,
        "gradient_evaluations": position.step * parts.gradients_per_step,
        "seconds": position.clock.seconds,
        "cpu_seconds": position.clock.cpu_seconds,
    }
    # The optimizer's numbers first: under a name of ours the row's own value stands.
    record.append({**numbers, **row})
    return row if (unclipped := numbers.get("unclipped")) is None else {**row, "unclipped": unclipped}


def _end(
    parts: Components,
    position: Position,
    record: Record,
    status: Literal["finished", "diverged"],
    loss: float | None,
) -> EndRow:
    run, team = parts.run, parts.team
    # From the log and not from sums: they would have to be part of every checkpoint.
    shares = [r["unclipped"] for r in record.rows() if r.get("unclipped") is not None]
    size, tokens = build.parameter_count(parts.model), position.step * run.tokens_per_step
    return {
        "status": status,
        "loss": loss,
        "bits_per_byte": None if loss is None else parts.bits_per_byte(loss),
        "steps": position.step,
        "tokens": tokens,
        "gradient_evaluations": position.step * parts.gradients_per_step,
        "flops": 6 * size * tokens * parts.gradients_per_step,
        "seconds": position.clock.seconds,
        "cpu_seconds": position.clock.cpu_seconds,
        "parameters": size,
        "state_bytes": contender.state_bytes(parts.optimizer),
        "unclipped": sum(shares) / len(shares) if shares else None,
        "gradient_clipped": position.clipped_share,
        "environment": {
            **provenance.describe(threads=run.threads, device=run.device),
            # Not where there are several processes: the small problem would be summed over them.
            **(
                {"processes": team.size, "layout": type(team).__name__}
                if team.size > 1
                else provenance_of(parts.contender, parts.optimizer, run.device)
            ),
        },
    }
