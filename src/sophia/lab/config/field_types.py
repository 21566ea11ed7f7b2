"""Types of configuration fields: numbers with their bounds, names with their choices."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

__all__ = [
    "AboveZero",
    "AtLeastZero",
    "Count",
    "Device",
    "Fraction",
    "Precision",
    "ScheduleKind",
    "Seed",
    "Whole",
]

Count = Annotated[int, Ge(1)]
"""1, 2, 3, ..."""
Whole = Annotated[int, Ge(0)]
"""0, 1, 2, ..."""
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
"""What torch's generators take."""
Fraction = Annotated[float, Interval(ge=0, le=1)]
"""A part of a whole."""
AboveZero = Annotated[float, Gt(0)]
"""A factor."""
AtLeastZero = Annotated[float, Ge(0)]
"""A size, of which 0 means none."""
ScheduleKind = Literal["cosine", "wsd"]
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
