"""Sentences of a verdict: numbers rounded so that the rounding neither hides nor adds a claim."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, isinf, log10
from typing import Protocol

from sophia.lab.analysis.seed_noise import LEVEL, OWN_SEEDS, Ends, Estimate, plural
from sophia.lab.analysis.speedup import Ratio

MOST_SEEDS = 50
"""More are not proposed."""


class Counted(Protocol):
    """Counts of runs in a row of the table."""

    @property
    def finished(self) -> int: ...
    @property
    def diverged(self) -> int: ...
    @property
    def missing(self) -> int: ...


class Costs(Protocol):
    """Sums of costs."""

    @property
    def runs(self) -> int: ...
    @property
    def steps(self) -> float: ...
    @property
    def gradient_evaluations(self) -> float: ...
    @property
    def flops(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def cpu_seconds(self) -> float: ...
    @property
    def shared_steps(self) -> float: ...


def decimals(estimate: Estimate) -> int:
    """Enough decimals for two digits of the interval's half width, and for a bound near zero to keep its
    sign.
    """
    if estimate.low is None or estimate.high is None:
        return 3
    half = (estimate.high - estimate.low) / 2
    places = min(5, max(2, ceil(-log10(half)) + 1)) if half > 0 else 3
    while places < 5 and any(b != 0 and round(b, places) == 0 for b in (estimate.low, estimate.high)):
        places += 1
    return places


def difference_words(estimate: Estimate) -> str:
    """The difference with its interval: "difference +0.057, 90% interval +0.030 to +0.084"."""
    places = decimals(estimate)
    text = f"difference {estimate.value:+.{places}f}"
    if estimate.low is None or estimate.high is None:
        return f"{text}, no interval from {plural(estimate.seeds, 'seed')}"
    return f"{text}, {LEVEL:.0%} interval {estimate.low:+.{places}f} to {estimate.high:+.{places}f}"


def ratio_words(ratio: Ratio) -> str:
    """The speed-up: open where the measured budgets cannot tell, marked where extrapolated.

    >>> ratio_words(Ratio(0.8, 0.71, 0.91, 0.5, 2.0, False, ""))
    '0.80x (0.71 to 0.91)'
    >>> ratio_words(Ratio(float("inf"), 1.2, float("inf"), 0.5, 2.0, True, ""))
    'more than 2x (1.20 to more than 2; extrapolated)'
    """
    value = bound_words(ratio.value, ratio, unit="x")
    inside = []
    if ratio.low is not None and ratio.high is not None:
        low, high = bound_words(ratio.low, ratio), bound_words(ratio.high, ratio)
        if low != high or "than" not in low:  # two equal bounds in words are the value in words
            inside.append(f"{low} to {high}")
    else:
        inside.append("no interval")
    if ratio.extrapolated:
        inside.append("extrapolated")
    return f"{value} ({'; '.join(inside)})" if inside else value


def bound_words(value: float, ratio: Ratio, *, unit: str = "") -> str:
    """One number of a speed-up, capped in words."""
    if value > ratio.ceiling:
        return f"more than {ratio.ceiling:.3g}{unit}"
    if value < ratio.floor:
        return f"less than {ratio.floor:.3g}{unit}"
    if (
        not unit and value != 1 and round(value, 2) == 1
    ):  # a rounded bound must not lie on the line it excludes
        return f"{value:.4f}{unit}"
    return f"{value:.2f}{unit}"


def cost_sentence(contender: str, cost: str, ratio: Ratio) -> str:
    """The speed-up in one cost with its verdict."""
    return f"{contender}: {ratio_words(ratio)} in {cost}: {ratio.verdict}."


def steps_factor_sentence(ratio: Ratio, baseline: str) -> str:
    """The speed-up in steps turned round: how many times the baseline's steps the contender needs."""
    turned = _turned(ratio)
    value = bound_words(turned.value, turned, unit="x")
    beyond = f"; extrapolated beyond {baseline}'s runs" if ratio.extrapolated else ""
    if turned.low is None or turned.high is None:
        return f"It needs {value} the steps for the same loss (no interval{beyond})."
    low, high = bound_words(turned.low, turned), bound_words(turned.high, turned)
    open_ended = low == high and "than" in low
    interval = f"{low} to {high}"
    if open_ended:
        return f"It needs {low}x the steps for the same loss{beyond.replace(';', ',')}."
    if ratio.verdict == "not distinguishable":  # the value alone would be read as a claim
        return f"For the same loss it needs {interval} times the steps{beyond.replace(';', ',')}."
    return f"It needs {value} the steps for the same loss ({interval}{beyond})."


def _turned(ratio: Ratio) -> Ratio:
    def one_over(value: float) -> float:
        return 0.0 if isinf(value) else float("inf") if value == 0 else 1 / value

    low = None if ratio.high is None else one_over(ratio.high)
    high = None if ratio.low is None else one_over(ratio.low)
    return Ratio(
        one_over(ratio.value), low, high, 1 / ratio.ceiling, 1 / ratio.floor, ratio.extrapolated, ratio.curve
    )


def loss_sentence(
    contender: str,
    baseline: str,
    word: str,
    difference: Estimate | None,
    ends: Ends,
    steps: int,
    own: Counted | None,
    other: Counted | None,
) -> str:
    """The first sentence of a verdict: losses, their difference with its interval, and the word for it."""
    if difference is None:
        if word == "unstable" and own is not None:
            return f"{contender}: unstable ({_diverged(own)}): no loss to compare."
        if word == "baseline unstable" and other is not None:
            return f"{contender}: no verdict, because {baseline} is unstable ({_diverged(other)})."
        both = f"both {contender} and {baseline}"
        return f"{contender}: no verdict yet: no seed has finished at {steps:,} steps with {both}."
    losses = _paired_means(ends, contender, baseline, steps)
    places = max(3, decimals(difference))
    text = (
        f"{contender}: loss {losses[contender]:.{places}f} against {losses[baseline]:.{places}f} "
        f"({difference_words(difference)}): "
    )
    if word == "unstable" and own is not None:
        return f"{text}unstable ({_diverged(own)}); the losses are those of the seeds that finished."
    if word == "baseline unstable" and other is not None:
        return f"{text}no verdict, because {baseline} is unstable ({_diverged(other)})."
    if word == "not distinguishable":
        return f"{text}not distinguishable from {baseline}{_so_far(own, other)}."
    return f"{text}{word} than {baseline}{_so_far(own, other)}."


def _diverged(row: Counted) -> str:
    return f"{row.diverged} of {row.finished + row.diverged + row.missing} diverged"


def _so_far(own: Counted | None, other: Counted | None) -> str:
    """A verdict from part of the planned seeds says so."""
    return " so far" if any(row is not None and row.missing for row in (own, other)) else ""


def _paired_means(ends: Ends, contender: str, baseline: str, steps: int) -> Mapping[str, float]:
    seeds = [s for c, b, s in ends if (c, b) == (contender, steps) and (baseline, steps, s) in ends]
    return {name: sum(ends[name, steps, s] for s in seeds) / len(seeds) for name in (contender, baseline)}


def half_budget_sentence(
    contender: str, baseline: str, half: int, full: int, answer: str, estimate: Estimate
) -> str:
    """The paper's claim as a question with an answer."""
    return (
        f"Does {contender} at {half:,} steps reach {baseline}'s loss at {full:,}? "
        f"{answer.capitalize()} ({difference_words(estimate)})."
    )


def power_sentence(seeds: int, now: float | None, seen: float | None, needed: int | None) -> str:
    """What these seeds can establish, and what a difference takes that was seen and is not established.

    >>> power_sentence(2, 0.08, None, None)
    'With 2 seeds a true difference of 0.08 would be established four times in five.'
    >>> power_sentence(2, 0.08, 0.05, 5).partition("; ")[2]
    'one of 0.05, the smallest that was seen and is not established, would take 5 seeds (--seeds 5).'
    """
    if now is None:
        return "One finished pair or less cannot tell noise from effect: run at least 2 seeds."
    text = (
        f"With {plural(seeds, 'seed')} a true difference of {now:.2g} would be established four times in five"
    )
    if seen is None or (needed is not None and needed <= seeds):
        return f"{text}."
    text += f"; one of {seen:.2g}, the smallest that was seen and is not established, would take"
    if needed is None or needed > MOST_SEEDS:
        return f"{text} more than {MOST_SEEDS} seeds: too small to be told apart here."
    return f"{text} {plural(needed, 'seed')} (--seeds {needed})."


def spent_sentence(spent: Costs) -> str:
    """Costs of a whole comparison; what budgets share is counted once."""
    shared = (
        f"; {spent.shared_steps:,.0f} steps that budgets share were done once" if spent.shared_steps else ""
    )
    return (
        f"All {plural(spent.runs, 'run')} together: {spent.steps:,.0f} steps, "
        f"{spent.gradient_evaluations:,.0f} gradient evaluations, {spent.flops:.3g} FLOPs, "
        f"{spent.seconds:,.0f} seconds of training ({spent.cpu_seconds:,.0f} CPU seconds){shared}."
    )


def route_sentence(estimate: Estimate) -> str:
    """How a contender's interval was made."""
    degrees = f"Student's t with {estimate.degrees:.0f} degrees of freedom"
    if estimate.own:
        return f"paired differences of {estimate.seeds} seeds, {degrees}"
    why = f"noise pooled over all contenders because there are fewer than {OWN_SEEDS}"
    return f"{plural(estimate.seeds, 'paired seed')}, {why}, {degrees}"


def heading(contender: str, baseline: str, word: str, *, complete: bool = True) -> str:
    """The verdict as a heading; of an unfinished comparison it is one so far.

    >>> heading("sophia-g", "adamw", "slower")
    'sophia-g is slower than adamw'
    """
    so_far = "" if complete else " so far"
    return {
        "faster": f"{contender} is faster than {baseline}{so_far}",
        "slower": f"{contender} is slower than {baseline}{so_far}",
        "not distinguishable": f"{contender} is not distinguishable from {baseline}{so_far}",
        "unstable": f"{contender} is unstable",
        "baseline unstable": f"{contender}: no verdict, because {baseline} is unstable",
    }.get(word, f"{contender}: no verdict yet")
