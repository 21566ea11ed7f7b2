"""Experiment trackers that get a run's curves: TensorBoard, W&B, trackio, or a class of the user's.

The records stay the truth, and a tracker is a copy: it gets every row of a run's log once and in order, also
if the run was killed and does some steps again, or if the tracker joins when the run is half done. For that
the run's folder keeps ``tracker-NAME.sent``, a line for each row that was sent, written just before it is: a
kill between the two costs a point, and never doubles one.

A tracker of your own is a class that is made with a `Tracked` and has the two methods of `Tracker`; its name
on the command line is ``module:Class``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sophia.lab.support.dataclass_json import to_json
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.support.import_by_path import load_class
from sophia.lab.training.run_folder import Record

__all__ = ["NAMES", "Tracked", "Tracker", "TrackerFailed", "Trackers", "scalars"]

NAMES = ("tensorboard", "wandb", "trackio")
"""Trackers of the package: names that are also those of the packages they need, and of the extras."""

_CLASSES = {name: f"sophia.lab.training.tracker_hosts:{name.capitalize()}" for name in NAMES}

_TRAINING = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "gradient_clipped": "train/gradient_clipped",
    "lr": "lr",
    "tokens": "tokens",
    "gradient_evaluations": "gradient_evaluations",
    "seconds": "seconds",
    "cpu_seconds": "cpu_seconds",
}
"""Names of what every optimizer's log has; what else is in a row is the optimizer's own."""


@dataclass(frozen=True)
class Tracked:
    """The run that a tracker is made for."""

    name: str
    """For people: contender, steps, seed, and the start of the hash."""
    id: str
    """Hash of the configuration; the same when the run goes on."""
    group: str
    """The comparison or sweep it belongs to."""
    config: Mapping[str, Any]
    """Everything that decides the result, as plain values."""
    folder: Path
    """Where a tracker may write; shared by the runs of a group."""
    resumed: bool
    """Whether this tracker has had rows of this run before."""


class Tracker(Protocol):
    """A copy of a run's curves somewhere. Made with a `Tracked`, in the process that trains."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, finite, by names such as "train/loss", "validation/loss", "lr",
        "tokens_per_second" and "optimizer/unclipped". One step may come twice, with other names.
        """

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The run has ended with this result; None if it was stopped or failed, and may go on later."""


class TrackerFailed(UserWarning):
    """Warning: a tracker raised, and the run goes on without it."""


@dataclass(frozen=True)
class Trackers:
    """Trackers of the runs of a command; none unless given."""

    names: tuple[str, ...] = ()
    """Of `NAMES`, or ``module:Class``."""
    group: str = ""
    folder: Path = Path()

    def check(self) -> None:
        """Raise for names of nothing and packages that are not installed; call it before anything runs."""
        for name in self.names:
            if ":" in name:
                load_class(name)
            elif name not in NAMES:
                raise UsageError(
                    f"There is no tracker {name!r}. Choose from: {', '.join(NAMES)}; or give one of your own "
                    "as module:Class."
                )
            elif not _installed(name):
                raise LabError(
                    f"--tracker {name} needs the package {name!r}, which is not installed. "
                    f"Write: pip install 'torch-sophia[lab,{name}]'"
                )

    def words(self) -> tuple[str, ...]:
        """For each tracker of the package a line that says where its curves are."""
        mode = os.environ.get("WANDB_MODE", "offline")
        upload = f"; to upload: wandb sync {self.folder}/wandb/offline-run-*" if mode == "offline" else ""
        lines = {
            "tensorboard": f"TensorBoard: tensorboard --logdir {self.folder / 'tensorboard'}",
            "wandb": f"W&B, {mode}{upload}",
            "trackio": "Trackio: trackio show --project sophia",
        }
        return tuple(lines[name] for name in dict.fromkeys(self.names) if name in lines)

    @contextlib.contextmanager
    def follow(self, record: Record) -> Iterator[None]:
        """Within the block every row that is added to the record goes to every tracker.

        Raises ``LabError`` if one cannot be opened: what was asked for is then missing from the first step
        on. One that fails later is warned of (`TrackerFailed`) and left out.
        """
        feeds: list[_Feed] = []
        result: Mapping[str, Any] | None = None
        try:
            for name in dict.fromkeys(self.names):
                feeds.append(_Feed(name, self, record))
                record.listeners.append(feeds[-1].row)
            yield
            result = record.result()
        finally:
            record.listeners.clear()
            for feed in feeds:
                feed.finish(result)


class _Feed:
    """One tracker of one run."""

    def __init__(self, name: str, trackers: Trackers, record: Record) -> None:
        config = record.config
        self._name, self._record = name, record
        self._marks = record.folder / f"tracker-{name.replace(':', '.')}.sent"
        self._sent = len(self._marks.read_text().splitlines()) if self._marks.exists() else 0
        self._seen: int | None = None  # rows of the log that have been looked at; None before the first
        self._before: Mapping[str, Any] | None = None
        run = Tracked(
            name=f"{config.optimizer.contender}-{config.steps}-seed{config.seed}-{config.hash[:6]}",
            id=config.hash,
            group=trackers.group,
            config=to_json(config),
            folder=trackers.folder,
            resumed=self._sent > 0,
        )
        try:
            self._tracker: Tracker | None = load_class(_CLASSES.get(name, name))(run)
        except Exception as error:
            raise LabError(
                f"The tracker {name} could not be opened ({type(error).__name__}: {error}), so the run was "
                "not started. Mend that, or leave the tracker out."
            ) from error

    def row(self, row: Mapping[str, Any]) -> None:
        """A row was added to the log."""
        if self._seen is None:
            self._catch_up()
        else:
            self._next(row)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """The run has ended, or pauses."""
        if self._seen is None and result is not None:
            self._catch_up()
        with self._left_out_if_it_fails():
            if self._tracker is not None:
                self._tracker.finish(result)

    def _catch_up(self) -> None:
        # By now the log was cut to the checkpoint. It may hold rows from before the tracker joined; or fewer
        # than were sent, and those are made again, equal, and passed over.
        self._seen = 0
        for row in self._record.rows():
            self._next(row)

    def _next(self, row: Mapping[str, Any]) -> None:
        assert self._seen is not None, "the log was looked at before a row of it is sent"
        self._seen += 1
        if self._tracker is not None and self._seen > self._sent:
            with self._marks.open("a", encoding="utf-8") as file:
                file.write(f"{row['kind']} {row['step']}\n")
            with self._left_out_if_it_fails():
                self._tracker.log(int(row["step"]), scalars(row, self._before))
        if row["kind"] == "train":
            self._before = row

    @contextlib.contextmanager
    def _left_out_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker does, the run is worth more
            self._tracker = None
            warnings.warn(
                f"The tracker {self._name} failed ({type(error).__name__}: {error}); the run goes on without "
                "it, and its records are complete.",
                TrackerFailed,
                stacklevel=2,
            )


def scalars(row: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, float]:
    """The finite numbers of a row of a log, by the names that trackers get. ``before`` is the training row
    before it, for the pace; the pace counts the time of the steps alone, as the records do.

    >>> scalars({"kind": "train", "step": 10, "tokens": 640, "seconds": 2.0, "unclipped": 0.2})
    {'tokens': 640.0, 'seconds': 2.0, 'optimizer/unclipped': 0.2, 'tokens_per_second': 320.0}
    >>> scalars({"kind": "eval", "step": 10, "loss": 5.0, "bits_per_byte": None})
    {'validation/loss': 5.0}
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or key == "step":
            continue
        if math.isfinite(value):
            name = _TRAINING.get(key, f"optimizer/{key}") if row["kind"] == "train" else f"validation/{key}"
            found[name] = float(value)
    first = {"tokens": 0.0, "seconds": 0.0} if before is None else before
    if row["kind"] == "train" and row["seconds"] > first["seconds"]:
        found["tokens_per_second"] = (row["tokens"] - first["tokens"]) / (row["seconds"] - first["seconds"])
    return found


def _installed(package: str) -> bool:
    # A folder of that name, as wandb leaves one behind, is found as a package without a file.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
