"""What may be asked of a price: the options of `sophia plan`, and the values of an example."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """What may be given; None is found elsewhere."""

    size: str | None = None
    """A recipe (gpt2-125m, gpt2-355m, gpt2-540m, gpt2-770m, neox-1.5b, neox-6.6b, or 125M to 6.6B for short;
    or a TOML file), or a number of parameters such as 13B.
    """
    tokens: str | None = None
    """Tokens that AdamW reads, for instance 300B; steps x batch x context unless given."""
    steps: int | None = None
    """Steps of AdamW."""
    batch: int | None = None
    """Sequences in a step."""
    context: int | None = None
    """Tokens in a sequence."""
    hardware: str | None = None
    """v100, a100, h100 or h200, for its peak."""
    peak: float | None = None
    """FLOP/s of a device at its peak, for hardware of another kind."""
    utilisation: float | None = None
    """Fraction of the peak that training reaches."""
    devices: int | None = None
    """Devices that share the work."""
    price: float | None = None
    """Dollars for a device and hour."""
    step_seconds: float | None = None
    """Seconds of a step of AdamW on all devices, measured; goes before peak and utilisation."""
    speedup: float | None = None
    """How many times fewer steps Sophia needs for the same loss."""
    interval: tuple[float, float] | None = None
    """Of the speed-up: low and high."""
    contender: str | None = None
    """sophia-g, sophia-h, or another from the table of contenders; with --speedup-from, one of the
    comparison's.
    """
    update_every: int | None = None
    """Steps between two refreshes of the curvature."""
    fraction: float | None = None
    """Share of the batch that a refresh uses."""
    overhead: float | None = None
    """How much more time a step of Sophia takes, 0.05 for 5%; as much as it has more FLOPs unless given."""
