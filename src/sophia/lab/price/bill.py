"""From inputs to hours, money and a sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sophia.lab.price.inputs import REFRESH, TRAINED, Gain, Inputs, Known, Number, Span
from sophia.lab.support.units import count, dollars

__all__ = ["Column", "bill", "break_even", "plain", "sentence", "words"]


@dataclass(frozen=True)
class Column:
    """What a run takes with one optimizer."""

    name: str
    steps: Span
    tokens: Span
    flops: Span
    hours: Span
    """Of the clock."""
    device_hours: Span
    dollars: Span
    held: float
    """Bytes of weights, gradients and optimizer state, one copy."""
    refresh: float
    """Bytes more while a refresh lasts."""


def bill(inputs: Inputs) -> tuple[Column, ...]:
    """AdamW first, then each gain."""
    return (
        _column(_ADAMW, inputs),
        *(_column(gain, inputs) for gain in inputs.gains),
    )


def break_even(gain: Gain) -> float:
    """The speed-up in steps above which the contender is cheaper than AdamW."""
    return 1 + gain.more_time.value


def sentence(inputs: Inputs, gain: Gain) -> str:
    """What the contender does to AdamW's bill, in words that claim no more than the speed-up does."""
    columns = bill(inputs)
    base = columns[0].dollars.value.value
    own = gain.speedup.over(base * break_even(gain))
    start = f"{gain.contender} at a speed-up of {words(gain.speedup, plain)} in steps ({gain.source}): "
    text = f"{start}{dollars(base)} become {words(own, dollars)}, {_change(own, base)}."
    if gain.measured_at is not None and gain.measured_at < 0.5 * inputs.parameters.value:
        text += (
            f" It was measured with {count(gain.measured_at)} parameters; that it holds for "
            f"{count(inputs.parameters.value)} is assumed."
        )
    return text


def _change(own: Span, base: float) -> str:
    """How the bill changes; no direction is named that the interval does not have."""
    if own.low is not None and own.high is not None:
        if own.low.value <= base <= own.high.value:
            return "which could be less or more: not distinguishable"
        kind = "less" if own.high.value < base else "more"
    else:
        kind = "less" if own.value.value < base else "more"
    share = abs(own.value.value / base - 1)
    beyond = own.value.beyond * (1 if kind == "more" else -1)
    prefix = {1: "over ", -1: "under ", 0: ""}[beyond]
    return f"{prefix}{share:.0%} {kind}"


def words(span: Span, form: Callable[[float], str]) -> str:
    """A span in words.

    >>> words(Span(Number(2.0, 1), Number(1.5), Number(2.0, 1)), plain)
    'more than 2.00 (1.50 to more than 2.00)'
    """

    def one(number: Number) -> str:
        return {1: "more than ", -1: "less than ", 0: ""}[number.beyond] + form(number.value)

    if span.low is None or span.high is None:
        return one(span.value)
    return f"{one(span.value)} ({one(span.low)} to {one(span.high)})"


def plain(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


_NONE = Known(0.0, "the baseline")
_ADAMW = Gain("adamw", Span(Number(1.0)), "the baseline", _NONE, _NONE, state=Known(8, "the baseline"))


def _column(gain: Gain, inputs: Inputs) -> Column:
    speedup, parameters = gain.speedup, inputs.parameters.value
    tokens, devices = inputs.tokens.value, inputs.devices.value
    flops = inputs.flops_per_token.value * tokens
    if inputs.step_seconds is not None:
        seconds = tokens / inputs.tokens_per_step.value * inputs.step_seconds.value
    else:
        seconds = flops / (devices * inputs.peak.value * inputs.utilisation.value)
    hours = seconds / 3600 * (1 + gain.more_time.value)
    return Column(
        name=gain.name,
        steps=speedup.over(tokens / inputs.tokens_per_step.value),
        tokens=speedup.over(tokens),
        flops=speedup.over(flops * (1 + gain.more_flops.value)),
        hours=speedup.over(hours),
        device_hours=speedup.over(hours * devices),
        dollars=speedup.over(hours * devices * inputs.price.value),
        held=parameters * (TRAINED + gain.state.value),
        refresh=parameters * REFRESH if gain.more_flops.value else 0.0,
    )
