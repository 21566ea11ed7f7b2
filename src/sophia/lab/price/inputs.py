"""The inputs of a price, each with its source, and the numbers that may have no end on one side."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HARDWARE", "REFRESH", "TRAINED", "Gain", "Inputs", "Known", "Number", "Span"]

HARDWARE = {"v100": 125e12, "a100": 312e12, "h100": 989e12, "h200": 989e12}
"""Peak FLOP/s of a device, dense, in bfloat16 (v100: float16), by the maker's data sheets (SXM versions)."""

TRAINED, REFRESH = 8, 4
"""Bytes a parameter in float32: weight and gradient; and the gradient of a refresh, while it lasts."""


@dataclass(frozen=True)
class Known:
    """A number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Number:
    """A number, or one side of it."""

    value: float
    beyond: int = 0
    """1: more than the value, -1: less than it, 0: the value."""

    def over(self, other: float) -> Number:
        """``other`` divided by it."""
        return Number(other / self.value, -self.beyond)


@dataclass(frozen=True)
class Span:
    """A number with its interval; low and high are None if there is none."""

    value: Number
    low: Number | None = None
    high: Number | None = None

    def over(self, other: float) -> Span:
        """``other`` divided by it: the bounds change sides."""
        return Span(
            self.value.over(other),
            None if self.high is None else self.high.over(other),
            None if self.low is None else self.low.over(other),
        )


@dataclass(frozen=True)
class Gain:
    """How much faster in steps a contender is than AdamW, and what a step of it costs more."""

    contender: str
    speedup: Span
    """In steps at equal loss."""
    source: str
    more_flops: Known
    """Of a step, as a fraction of AdamW's."""
    more_time: Known
    state: Known
    """Bytes of optimizer state a parameter."""
    measured_at: float | None = None
    """Parameters of the model that it was measured with; None if it was not measured."""

    @property
    def name(self) -> str:
        """For a column."""
        return self.contender if self.measured_at is None else f"{self.contender}, measured"


@dataclass(frozen=True)
class Inputs:
    """Everything that a price is calculated from."""

    about: str
    parameters: Known
    flops_per_token: Known
    """Forward and backward."""
    tokens: Known
    """That AdamW reads."""
    tokens_per_step: Known
    peak: Known
    """FLOP/s of a device."""
    utilisation: Known
    """The fraction of the peak that training reaches."""
    devices: Known
    price: Known
    """Dollars for a device and hour."""
    step_seconds: Known | None
    """A step of AdamW on all devices, measured; the utilisation then follows from it."""
    activations: Known | None
    """Bytes of a sequence; None if the shape of the model is not known."""
    gains: tuple[Gain, ...]
