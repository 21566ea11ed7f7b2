"""One run, read from top to bottom. No optimizer's name appears here: a contender is a row in a table."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophia.lab.config import schedules
from sophia.lab.config.run import Run
from sophia.lab.data.tokens import Tokens, bits_per_byte
from sophia.lab.models import build
from sophia.lab.optimizers import contender, table
from sophia.lab.support import provenance
from sophia.lab.support.errors import Stopped, UsageError
from sophia.lab.support.files import locked
from sophia.lab.support.signals import Request
from sophia.lab.training import checkpoint
from sophia.lab.training.processes import Solo
from sophia.lab.training.run_folder import Record, Silent
from sophia.lab.training.trackers import Trackers

__all__ = ["Progress", "train"]


@dataclass(frozen=True)
class Progress:
    """How far a run is; sent at every row of its log."""

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
) -> dict[str, Any]:
    """Train, or go on from the last checkpoint, or do nothing if the run has ended; return its result.

    Leaves its records in ``runs/<hash>``. When ``stop`` is set it saves and raises ``Stopped``. With a
    ``team`` of several processes each of them calls it, on one folder, and the first writes. ``recompute``
    trades the activations of the blocks for a second forward; it changes no number. ``keep`` saves the
    trained model, as the last checkpoint. ``trackers`` get the rows of the log.
    """
    team = Solo() if team is None else team
    record = Record(runs, config) if team.rank == 0 else Silent(runs, config)
    with locked(record.folder, what="run") if team.rank == 0 else contextlib.nullcontext():
        if (result := record.result()) is None:
            record.open()
            request = Request() if stop is None else stop  # a request that was not made yet is false
            trackers = trackers if trackers is not None and team.rank == 0 else Trackers()
            with trackers.follow(record):
                result = _train(config, record, tokens, save_every, request, report, team, recompute, keep)
                record.finish(result)
    return result


def _train(
    config: Run,
    record: Record,
    tokens: Tokens,
    save_every: int,
    stop: Request,
    report: Callable[[Progress], None],
    team: Solo,
    recompute: bool,
    keep: bool,
) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    device = team.device(config.device)
    context, parts = config.model.context, config.micro_batches
    if config.batch % (parts * team.size):
        raise UsageError(
            f"a batch of {config.batch} sequences cannot be cut into {parts} equal parts on each of "
            f"{team.size} processes. Use micro-batches and processes whose product divides it."
        )
    tokens.require(context, "The text")
    held_out, held_out_bytes = tokens.held_out(sequences=config.evaluation.sequences, context=context)

    model = build.build(config.model, seed=config.seed)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model = team.place(model, device, precision=config.precision)
    parameters = [p for p in model.parameters() if p.requires_grad]
    row = table.of(config.optimizer)
    settings = row.settings(config.optimizer.settings)
    optimizer = row.build(model, settings, config.seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    cost = 1 + row.gradients(settings)  # gradient evaluations of a step

    step, loss_sum, loss_count = 0, 0.0, 0
    clipped_before, clipped = 0, 0  # steps whose gradient was longer than the limit: all, since the last row
    clock = _Clock()
    state = team.load(record.folder, model, optimizer)
    if state is not None:
        checkpoint.restore_random_state(state["random"])
        step, loss_sum, loss_count = state["step"], state["loss_sum"], state["loss_count"]
        clipped_before, clipped = state.get("clipped_before", 0), state.get("clipped", 0)
        clock = _Clock(state["seconds"], state["cpu_seconds"])
    record.cut(state["log"] if state is not None else 0)
    record.attempt(from_step=step)

    def save() -> None:
        team.save(
            record.folder,
            model,
            optimizer,
            {
                "random": checkpoint.random_state(),
                "step": step,
                "log": record.sync(),
                "loss_sum": loss_sum,
                "loss_count": loss_count,
                "clipped_before": clipped_before,
                "clipped": clipped,
                "seconds": clock.seconds,
                "cpu_seconds": clock.cpu_seconds,
            },
        )

    def evaluate() -> float:
        rows = max(1, config.batch // (parts * team.size))
        with team.autocast(device, config.precision):
            loss = _evaluate(model, held_out.to(device), rows=rows, team=team)
        bits = bits_per_byte(loss, predictions=held_out[:, 1:].numel(), bytes_=held_out_bytes)
        record.append({"kind": "eval", "step": step, "loss": loss, "bits_per_byte": bits})
        return loss

    def end(status: str, loss: float | None) -> dict[str, Any]:
        shares = [r["unclipped"] for r in record.rows() if r.get("unclipped") is not None]
        size, read = build.parameter_count(model), step * config.tokens_per_step
        return {
            "status": status,
            "loss": loss,
            "bits_per_byte": None
            if loss is None
            else bits_per_byte(loss, predictions=held_out[:, 1:].numel(), bytes_=held_out_bytes),
            "steps": step,
            "tokens": read,
            "gradient_evaluations": step * cost,
            "flops": 6 * size * read * cost,
            "seconds": clock.seconds,
            "cpu_seconds": clock.cpu_seconds,
            "parameters": size,
            "state_bytes": contender.state_bytes(optimizer),
            "unclipped": sum(shares) / len(shares) if shares else None,
            "gradient_clipped": (clipped_before + clipped) / step if step else None,
            "environment": {
                **provenance.describe(threads=config.threads, device=config.device),
                **({"processes": team.size, "layout": type(team).__name__} if team.size > 1 else {}),
            },
        }

    limit = config.clip or math.inf

    def gradients(batch: torch.Tensor) -> tuple[float, float]:
        """Those of a batch, clipped, in the parameters; returns the loss and the norm before clipping."""
        loss = 0.0
        for number, part in enumerate(team.share(batch).to(device).chunk(parts), 1):
            with team.accumulating(model, last=number == parts):
                with team.autocast(device, config.precision):
                    part_loss = model(input_ids=part, labels=part).loss / parts
                part_loss.backward()
            loss += float(part_loss.detach())
        (loss,) = team.mean([loss])
        return loss, _number(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def again(batch: torch.Tensor) -> Any:
        """The closure of an optimizer that makes passes of its own."""
        with torch.enable_grad():
            optimizer.zero_grad()
            return torch.tensor(gradients(batch)[0])

    if step == 0:
        evaluate()
    loss_at_end = math.nan
    while step < config.steps:
        clock.start()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedules.factor(config.schedule, step, steps=config.steps)
        batch = tokens.batch(seed=config.seed, step=step, size=config.batch, context=context)
        loss, norm = gradients(batch)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            clock.stop()
            return end("diverged", None)
        if row.closure:
            optimizer.step(functools.partial(again, batch))
        else:
            optimizer.step()
        optimizer.zero_grad()
        clock.stop()

        step, loss_sum, loss_count = step + 1, loss_sum + loss, loss_count + 1
        clipped += norm > limit
        if step % config.log_every == 0 or step == config.steps:
            numbers = team.stats(optimizer)
            mean, share = loss_sum / loss_count, clipped / loss_count
            clipped_before, clipped = clipped_before + clipped, 0
            loss_sum, loss_count = 0.0, 0
            record.append(
                {
                    **numbers,
                    "kind": "train",
                    "step": step,
                    "loss": mean,
                    "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": norm,
                    "gradient_clipped": share,
                    "tokens": step * config.tokens_per_step,
                    "gradient_evaluations": step * cost,
                    "seconds": clock.seconds,
                    "cpu_seconds": clock.cpu_seconds,
                }
            )
            report(Progress(step, mean, numbers.get("unclipped")))
        if step % config.evaluation.every == 0 or step == config.steps:
            loss_at_end = evaluate()
            if not math.isfinite(loss_at_end):
                return end("diverged", None)
        if team.agreed(bool(stop)) and step < config.steps:
            save()
            raise Stopped(
                f"Stopped at step {step} of {config.steps}; the state is saved.", signal=stop.signal or 0
            )
        if step % save_every == 0 and step < config.steps:
            save()
    if keep:
        save()
    return end("finished", loss_at_end)


@torch.no_grad()
def _evaluate(model: torch.nn.Module, held_out: torch.Tensor, *, rows: int, team: Solo) -> float:
    """Mean loss over the held-out predictions; parts of unequal size weigh by their size."""
    model.eval()
    mine, total = held_out[team.rank :: team.size], 0.0
    most = -(-len(held_out) // team.size)  # of any process: all call the model equally often
    for start in range(0, most, rows):
        part = mine[start : start + rows]
        loss = model(input_ids=part, labels=part).loss if len(part) else _waiting(model, held_out)
        total += float(loss) * len(part)
    model.train()
    total, count = team.mean([total, float(len(mine))])
    return total / count


def _waiting(model: torch.nn.Module, held_out: torch.Tensor) -> float:
    """A forward whose loss does not count, in step with the other processes."""
    model(input_ids=held_out[:1])
    return 0.0


def _number(norm: torch.Tensor) -> float:
    """The norm of all gradients; sharded ones give a sharded norm."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class _Clock:
    """Wall and processor seconds of the training steps alone, from clocks that are never set back."""

    def __init__(self, seconds: float = 0.0, cpu_seconds: float = 0.0) -> None:
        self.seconds, self.cpu_seconds = seconds, cpu_seconds
        self._began = (0.0, 0.0)

    def start(self) -> None:
        self._began = (time.monotonic(), time.process_time())

    def stop(self) -> None:
        self.seconds += time.monotonic() - self._began[0]
        self.cpu_seconds += time.process_time() - self._began[1]
