"""The contenders by name: one file of this folder each.

To add one, copy ``_template.py``, fill it in, and name the file in `FILES`.

Every contender decays matrices alone, sees the same batches and starts from the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType

from sophia.lab.config import run
from sophia.lab.optimizers import (
    ablated_sophia,
    adafactor,
    adahessian,
    adamw,
    adamw_apart,
    lion,
    muon,
    nadamw,
    sgd,
    signum,
    sophia,
    third_party,
)
from sophia.lab.optimizers.contender import Contender
from sophia.lab.support.errors import LabError, UsageError
from sophia.numerics import words

__all__ = ["CONTENDERS", "FILES", "by_name", "find", "of"]

FILES: tuple[ModuleType, ...] = (
    adamw,
    sophia,
    adahessian,
    ablated_sophia,
    adamw_apart,
    nadamw,
    adafactor,
    sgd,
    lion,
    signum,
    muon,
)
"""In the order of `sophia contenders`."""
FIRST = "of all first versions"


def by_name(files: Iterable[ModuleType]) -> dict[str, Contender]:
    """The contenders of some files: each has a ``CONTENDER``, or several in ``CONTENDERS``."""
    found = [row for file in files for row in getattr(file, "CONTENDERS", None) or (file.CONTENDER,)]
    return {row.name: row for row in found}


CONTENDERS: Mapping[str, Contender] = by_name(FILES)


def find(name: str, path: str | None = None) -> Contender:
    """The row of that name, or the contender that an installed package offers under it; with ``path``
    (``module:Class``) the one made from that class. Raises ``UsageError`` that lists the names.
    """
    if path is not None:
        if name in CONTENDERS:
            raise UsageError(
                f"{name}={path}: {name} is a row of the table of contenders, and one name cannot mean two "
                f"optimizers. Write another name, for instance my-{name}={path}."
            )
        return third_party.contender(name, path)
    if name in CONTENDERS:
        return CONTENDERS[name]
    offered = third_party.offered()
    if name in offered:
        return third_party.contender(name, offered[name])
    raise UsageError(
        f"There is no contender {name!r}. Choose from: {', '.join([*CONTENDERS, *offered])}; or give one of "
        "your own as module:Class."
    )


def of(optimizer: run.Optimizer) -> Contender:
    """The contender of a run. Raises ``LabError`` if its code is not the one the run was planned with."""
    path = optimizer.settings.get(third_party.CLASS)
    if path is not None:
        return third_party.contender(
            optimizer.contender, str(path), code=str(optimizer.settings[third_party.CODE])
        )
    row = find(optimizer.contender)
    if optimizer.numerics != (now := words(row.numerics)):
        raise LabError(
            f"{row.name}: the run was planned with the numerics {optimizer.numerics or FIRST}, and now they "
            f"are {now or FIRST} (sophia/numerics.py says what changed). Going on would mix two optimizers. "
            "Start another run, or go on with the code of that time."
        )
    return row
