"""What a search may vary: a range or a choice for each setting, in Python and in files.

In a file a range is ``{ low = 1e-4, high = 1e-2 }`` and a choice is a list, ``[0.8, 0.9, 0.95]``. The name
"warmup" in a space is no setting of an optimizer but the warm-up of its schedule, a fraction of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, log, sqrt
from typing import Annotated, Any

from pydantic import PlainValidator

from sophia.lab.config.run import Setting
from sophia.lab.support.errors import UsageError

__all__ = ["WARMUP", "Choice", "Kind", "LogRange", "Space", "at_edge", "read_kind"]

WARMUP = "warmup"


@dataclass(frozen=True)
class LogRange:
    """Every number from low to high, the logarithm uniform."""

    low: float
    high: float

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.low:g} to {self.high:g}"

    @property
    def middle(self) -> float:
        """The value in its middle, by the logarithm."""
        return sqrt(self.low * self.high)


@dataclass(frozen=True)
class Choice:
    """One of a few values; numbers in ascending order, so that the ends are known."""

    values: tuple[Setting, ...]

    @property
    def words(self) -> str:
        """For people."""
        return " or ".join(str(value) for value in self.values)

    @property
    def middle(self) -> Setting:
        """The value in its middle."""
        return self.values[len(self.values) // 2]

    def to_plain(self) -> list[Setting]:
        """As in a file."""
        return list(self.values)


def read_kind(value: Any, where: str) -> LogRange | Choice:
    """A range or a choice as it stands in a file, or ready-made. Raises ``UsageError`` with its name.

    >>> read_kind([0.8, 0.9], "adamw.beta1"), read_kind({"low": 1e-3, "high": 1}, "adamw.lr")
    (Choice(values=(0.8, 0.9)), LogRange(low=0.001, high=1.0))
    """
    try:
        return _read_kind(value)
    except ValueError as error:
        raise UsageError(f"{where} is {value!r}{error}") from None


def _read_kind(value: Any) -> LogRange | Choice:
    """As `read_kind`; the errors begin after the value."""
    if isinstance(value, LogRange):
        value = {"low": value.low, "high": value.high}
    if isinstance(value, Choice):
        value = list(value.values)
    if isinstance(value, list | tuple) and value:
        kinds = {type(v) for v in value}
        if len(kinds) == 1 and kinds <= {bool, int, float, str} and len(set(value)) == len(value):
            if kinds <= {int, float} and list(value) != sorted(value):
                raise ValueError(
                    f": numbers out of order hide which of them lie at the edge. Write {sorted(value)!r}."
                )
            return Choice(tuple(value))
    elif isinstance(value, dict) and set(value) == {"low", "high"}:
        ends = [v for v in value.values() if type(v) in (int, float) and isfinite(v)]
        if len(ends) == 2 and 0 < value["low"] < value["high"]:
            return LogRange(float(value["low"]), float(value["high"]))
    raise ValueError(
        ", which a search cannot draw from. Write { low = 1e-4, high = 1e-2 } with 0 < low < high for a "
        "range, or a list of different values of one type for a choice."
    )


Kind = Annotated[LogRange | Choice, PlainValidator(_read_kind)]
Space = Mapping[str, Kind]


def at_edge(space: Space, point: Mapping[str, Setting]) -> list[str]:
    """The settings of a point that lie at an end of their range: there the optimum may be outside.

    An end is the first or last of several ordered numbers, or the outer twentieth of a logarithmic range.
    """
    found = []
    for name, kind in space.items():
        value = point[name]
        if isinstance(kind, LogRange):
            share = log(float(value) / kind.low) / log(kind.high / kind.low)
            if not 0.05 <= share <= 0.95:
                found.append(name)
        elif (
            len(kind.values) > 2 and value in (kind.values[0], kind.values[-1]) and not isinstance(value, str)
        ):
            found.append(name)
    return found
