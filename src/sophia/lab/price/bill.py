"""From inputs to hours, dollars and a sentence.

    FLOPs of AdamW    = FLOPs of a token * tokens
    seconds           = FLOPs / (devices * peak * utilisation), or steps * measured seconds of a step
    dollars           = hours * devices * price of a device and hour
    of the contender  = of AdamW * (1 + its overhead) / its speed-up in steps

So a contender pays if its speed-up in steps is above 1 + overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sophia.lab.analysis.speedup import Ratio
from sophia.lab.analysis.verdict_words import ratio_words
from sophia.lab.support.units import count, dollars

__all__ = ["Amount", "Gain", "Known", "amount_words", "costs", "costs_of_adamw", "sentence"]


class Known(NamedTuple):
    """A number and where it is from."""

    value: float
    source: str


class Amount(NamedTuple):
    """A cost; ``bound`` is "less than " or "more than " where the speed-up is open on that side."""

    value: float
    bound: str = ""


@dataclass(frozen=True)
class Gain:
    """How many times fewer steps a contender needs than AdamW, and what a step of it costs more."""

    contender: str
    speedup: Ratio
    """In steps at equal loss."""
    source: str
    flops: Known
    """More FLOPs of a step, as a fraction of AdamW's."""
    time: Known
    """More time of a step, likewise."""
    state: Known
    """Bytes of optimizer state a parameter."""
    measured_at: float | None = None
    """Parameters of the model that it was measured with; None if it was not measured."""


def costs_of_adamw(inputs: Mapping[str, Known]) -> dict[str, float]:
    """What the run takes with AdamW."""
    of = {name: known.value for name, known in inputs.items()}
    steps, flops = of["tokens"] / of["batch"] / of["context"], of["flops_per_token"] * of["tokens"]
    hours = flops / of["devices"] / of["peak"] / of["utilisation"] / 3600
    device_hours = hours * of["devices"]
    counted = {"steps": steps, "tokens": of["tokens"], "flops": flops}
    return counted | {"hours": hours, "device_hours": device_hours, "dollars": device_hours * of["price"]}


def costs(adamw: Mapping[str, float], gain: Gain) -> dict[str, tuple[Amount, ...]]:
    """What it takes with a contender: the value, and low and high if its speed-up has an interval."""
    by = gain.speedup
    more = {"steps": 0.0, "tokens": 0.0, "flops": gain.flops.value}

    def divided(total: float, speedup: float) -> Amount:
        bound = "less than " if speedup > by.ceiling else "more than " if speedup < by.floor else ""
        return Amount(total / min(max(speedup, by.floor), by.ceiling), bound)

    # The faster, the cheaper: the ends of the interval change sides.
    speedups = (by.value,) if by.low is None or by.high is None else (by.value, by.high, by.low)
    return {
        name: tuple(divided(cost * (1 + more.get(name, gain.time.value)), speedup) for speedup in speedups)
        for name, cost in adamw.items()
    }


def amount_words(amounts: tuple[Amount, ...], form: Callable[[float], str]) -> str:
    """A cost with its interval.

    >>> amount_words((Amount(2.0, "less than "), Amount(2.0, "less than "), Amount(3.05)), "{:.2f}".format)
    'less than 2.00 (less than 2.00 to 3.05)'
    """
    value, *ends = (amount.bound + form(amount.value) for amount in amounts)
    return f"{value} ({ends[0]} to {ends[1]})" if ends else value


def sentence(adamw: Mapping[str, float], gain: Gain, parameters: float) -> str:
    """What the contender does to AdamW's bill, in words that claim no more than the speed-up does."""
    before, amounts = adamw["dollars"], costs(adamw, gain)["dollars"]
    now, *ends = amounts
    word = "less" if now.value < before else "more"
    # "Less than $1" for $2 is over 50% less, "more than $1" under 50% less.
    side = "" if not now.bound else "over " if now.bound.startswith(word) else "under "
    change = f"{side}{abs(now.value / before - 1):.0%} {word}"
    if ends and ends[0].value <= before <= ends[1].value:
        change = "which could be less or more: not distinguishable"
    text = (
        f"{gain.contender} at a speed-up of {ratio_words(gain.speedup)} in steps ({gain.source}): "
        f"{dollars(before)} become {amount_words(amounts, dollars)}, {change}."
    )
    if gain.measured_at is not None and gain.measured_at < 0.5 * parameters:
        text += (
            f" It was measured with {count(gain.measured_at)} parameters; that it holds for "
            f"{count(parameters)} is assumed."
        )
    return text
