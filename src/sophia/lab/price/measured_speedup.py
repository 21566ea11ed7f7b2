"""The speed-up of a contender as a comparison has measured it."""

from __future__ import annotations

from pathlib import Path

from sophia.lab.analysis.speedup import Ratio
from sophia.lab.analysis.verdict import Summary, Verdict, summarise
from sophia.lab.price.inputs import Gain, Known, Number, Span
from sophia.lab.support.errors import UsageError

__all__ = ["measured_gain"]


def measured_gain(folder: Path, contender: str) -> Gain:
    """Its speed-up in steps with the interval, and what a step costs more, by the count of gradients: the
    seconds of a small model on another machine say nothing about those of a large one.

    Raises ``UsageError`` if the comparison has not measured one.
    """
    summary = summarise(folder)
    verdict = next((v for v in summary.verdicts if v.contender == contender), None)
    if verdict is None:
        names = ", ".join(v.contender for v in summary.verdicts)
        raise UsageError(
            f"{folder} has no contender {contender!r} beside its baseline, so there is no speed-up of it to "
            f"read. Choose with --contender from: {names}."
        )
    ratio = next((s.ratio for s in verdict.speedups if s.cost == "steps"), None)
    if ratio is None:
        why = summary.curve_problem or verdict.word
        raise UsageError(
            f"{folder} has no speed-up of {contender} ({why}). Finish that comparison, or give a number with "
            "--speedup."
        )
    return Gain(
        contender,
        _span(ratio),
        source=f"measured: {folder}" + ("; extrapolated" if ratio.extrapolated else ""),
        more_flops=(more := _overhead(summary, verdict, folder)),
        more_time=more,
        state=_state(summary, contender, folder),
        measured_at=max((row.parameters or 0.0 for row in summary.rows), default=0.0) or None,
    )


def _span(ratio: Ratio) -> Span:
    def number(value: float) -> Number:
        if value > ratio.ceiling:
            return Number(ratio.ceiling, 1)
        return Number(ratio.floor, -1) if value < ratio.floor else Number(value)

    if ratio.low is None or ratio.high is None:
        return Span(number(ratio.value))
    return Span(number(ratio.value), number(ratio.low), number(ratio.high))


def _state(summary: Summary, contender: str, folder: Path) -> Known:
    rows = [r for r in summary.rows if r.contender == contender and r.state_bytes and r.parameters]
    shares = [(row.state_bytes or 0.0) / (row.parameters or 1.0) for row in rows]
    return Known(round(max(shares, default=0.0), 2), f"as kept in {folder}")


def _overhead(summary: Summary, verdict: Verdict, folder: Path) -> Known:
    """From the counts of gradients in the runs: of its step over the baseline's."""

    def per_step(name: str) -> float | None:
        counts = [
            row.gradient_evaluations / row.steps
            for row in summary.rows
            if row.contender == name and row.gradient_evaluations and not row.diverged
        ]
        return sum(counts) / len(counts) if counts else None

    own, base = per_step(verdict.contender), per_step(summary.evidence.baseline)
    if own is None or base is None:
        raise UsageError(
            f"{folder} does not say how many gradients {verdict.contender} takes. Give its overhead with "
            "--overhead."
        )
    return Known(own / base - 1, f"gradients counted in {folder}")
