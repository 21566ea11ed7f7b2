"""Totals of a comparison: end losses and costs by budget, costs of a step, sum over all runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

from sophia.lab.analysis.cost_ratio import CostRatio, cost_ratio
from sophia.lab.analysis.read_records import Evidence, Run, number
from sophia.lab.config.record_format import EndNumber

__all__ = ["Row", "Spent", "StepCost", "ends_of", "spent", "step_costs"]


@dataclass(frozen=True)
class Row:
    """One contender at one budget; every mean is over its finished runs, None where there is none or
    nothing was recorded.
    """

    contender: str
    steps: int
    finished: int
    diverged: int
    missing: int
    """Planned runs without a result: unfinished or not started."""
    loss: float | None
    """Mean validation loss at the end, nats a token."""
    sd: float | None
    """Its standard deviation over seeds."""
    bits_per_byte: float | None
    tokens: float | None
    gradient_evaluations: float | None
    flops: float | None
    seconds: float | None
    cpu_seconds: float | None
    unclipped: float | None
    """Share of coordinates that the clip leaves alone; None for optimizers without one."""
    parameters: float | None
    state_bytes: float | None


@dataclass(frozen=True)
class StepCost:
    """Costs of a step of one contender, mean over its finished runs; None where nothing was recorded."""

    contender: str
    gradient_evaluations: float | None
    flops: float | None
    seconds: float | None
    cpu_seconds: float | None
    relative: CostRatio | None
    """Its seconds of a step over the baseline's, over all pairs of equal seed and budget; None for the
    baseline.
    """
    state_per_parameter: float | None
    """Bytes."""


@dataclass(frozen=True)
class Spent:
    """Sum over all runs that have ended. A part that was trained once for several budgets, as
    older records have it, is counted once.
    """

    runs: int
    steps: float
    gradient_evaluations: float
    flops: float
    seconds: float
    cpu_seconds: float
    shared_steps: float
    """Steps that were not done again, because a longer run of the same contender and seed had done them."""


def ends_of(evidence: Evidence) -> tuple[Row, ...]:
    """A row for every contender and budget."""
    return tuple(
        _row(evidence, c, b)
        for c in evidence.contenders
        for b in sorted({r.steps for r in evidence.runs if r.contender == c})
    )


def _row(evidence: Evidence, contender: str, steps: int) -> Row:
    runs = [r for r in evidence.runs if (r.contender, r.steps) == (contender, steps)]
    finished = [r for r in runs if r.status == "finished"]

    def values(key: EndNumber) -> list[float]:
        return [v for r in finished if (v := r.number(key)) is not None]

    def mean(key: EndNumber) -> float | None:
        return fmean(found) if (found := values(key)) else None

    return Row(
        contender=contender,
        steps=steps,
        finished=len(finished),
        diverged=sum(r.status == "diverged" for r in runs),
        missing=sum(r.status in ("missing", "unfinished") for r in runs),
        loss=mean("loss"),
        sd=stdev(losses) if len(losses := values("loss")) > 1 else None,
        bits_per_byte=mean("bits_per_byte"),
        tokens=mean("tokens"),
        gradient_evaluations=mean("gradient_evaluations"),
        flops=mean("flops"),
        seconds=mean("seconds"),
        cpu_seconds=mean("cpu_seconds"),
        unclipped=mean("unclipped"),
        parameters=mean("parameters"),
        state_bytes=mean("state_bytes"),
    )


def step_costs(evidence: Evidence) -> tuple[StepCost, ...]:
    """A row for every contender with a finished run."""
    found = []
    runs = {(r.contender, r.steps, r.seed): r for r in evidence.runs if r.status == "finished"}
    for contender in evidence.contenders:
        mine = [run for (name, _, _), run in runs.items() if name == contender]
        if not mine:
            continue
        pairs = [
            (a, b)
            for (name, steps, seed), run in runs.items()
            if name == contender and contender != evidence.baseline
            if (partner := runs.get((evidence.baseline, steps, seed))) is not None
            if (a := _a_step(run, "seconds")) and (b := _a_step(partner, "seconds"))
        ]
        found.append(
            StepCost(
                contender=contender,
                gradient_evaluations=_mean(mine, lambda r: _a_step(r, "gradient_evaluations")),
                flops=_mean(mine, lambda r: _a_step(r, "flops")),
                seconds=_mean(mine, lambda r: _a_step(r, "seconds")),
                cpu_seconds=_mean(mine, lambda r: _a_step(r, "cpu_seconds")),
                relative=cost_ratio(pairs),
                state_per_parameter=_mean(mine, _state),
            )
        )
    return tuple(found)


def spent(evidence: Evidence) -> Spent:
    """The sum over runs that have ended, finished or diverged."""
    ended = [r for r in evidence.runs if r.status in ("finished", "diverged")]
    names = {run.name for run in ended}
    summed: tuple[EndNumber, ...] = ("steps", "gradient_evaluations", "flops", "seconds", "cpu_seconds")
    totals = dict.fromkeys(summed, 0.0)
    shared_steps = 0.0
    for run in ended:
        steps, part = run.number("steps") or 0.0, run.result.get("trunk")
        # Older records alone have such a part (`SharedPart`). It is taken off only where the run that did it
        # is among these: else nobody would count it.
        known = part if isinstance(part, dict) and part.get("run") in names - {run.name} else {}
        shared = min(max(number(known.get("steps")) or 0.0, 0.0), steps)
        shared_steps += shared
        for key in totals:
            cost = run.number(key) or 0.0
            measured = number(known.get(key))
            off = min(measured, cost) if measured is not None else cost * shared / steps if steps else 0.0
            totals[key] += cost - max(off, 0.0)
    return Spent(runs=len(ended), shared_steps=shared_steps, **totals)


def _a_step(run: Run, key: EndNumber) -> float | None:
    cost, steps = run.number(key), run.number("steps")
    return None if cost is None or not steps else cost / steps


def _state(run: Run) -> float | None:
    state, parameters = run.number("state_bytes"), run.number("parameters")
    return None if state is None or not parameters else state / parameters


def _mean(runs: list[Run], of: Callable[[Run], float | None]) -> float | None:
    return fmean(found) if (found := [v for run in runs if (v := of(run)) is not None]) else None
