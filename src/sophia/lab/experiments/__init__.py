"""One file per claim of the paper: ``sophia experiment NAME``.

A new experiment is a module here that defines ``EXPERIMENT``, and a line in ``NAMES``. See
``experiment.Experiment`` for what it has to say, ``records.Records`` for what its run writes and its picture
reads.
"""

from __future__ import annotations

import importlib

from sophia.lab.experiments.framework.definition import Experiment
from sophia.lab.support.errors import UsageError

__all__ = ["NAMES", "every", "find"]

NAMES: tuple[str, ...] = (
    "toy-landscape",
    "condition-number",
    "even-progress",
    "sharpness",
    "estimators",
    "overhead",
    "stability",
    "ablations",
    "half-the-steps",
    "one-line",
    "few-resources",
    "fraction",
    "few-shot",
)
"""All experiments, in the order of the list that ``sophia experiment`` prints."""


def find(name: str) -> Experiment:
    """The experiment of that name. Raises ``UsageError`` that lists the names."""
    if name not in NAMES:
        raise UsageError(f"There is no experiment {name!r}. Choose from: {', '.join(NAMES)}.")
    module = importlib.import_module(f"sophia.lab.experiments.{name.replace('-', '_')}")
    experiment = module.EXPERIMENT
    assert isinstance(experiment, Experiment)
    return experiment


def every() -> list[Experiment]:
    """All experiments, in order."""
    return [find(name) for name in NAMES]
