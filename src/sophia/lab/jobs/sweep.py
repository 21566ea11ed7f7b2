"""`sophia sweep`: equal trials for every contender, and the protocol with the winners as settings.

A folder gets ``sweep.json`` (what was decided before the first trial), ``journal.log`` (Optuna's), ``runs/``,
and at the end ``trials.jsonl`` (every trial) and ``tuned.toml`` (for `sophia compare --protocol`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sophia.lab.config.field_types import Device
from sophia.lab.config.record_format import EndRow
from sophia.lab.config.run import Data, Run, Setting
from sophia.lab.config.search_space import at_edge
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.forecast import comparison
from sophia.lab.jobs import reuse
from sophia.lab.jobs.say_forecast import say_forecast
from sophia.lab.jobs.search import Trial, begun_runs, best, rounds, search
from sophia.lab.protocols import freeze, plan
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.protocols.protocol_file import text_of
from sophia.lab.support.dataclass_json import to_json
from sophia.lab.support.errors import LabError, Stopped, UsageError
from sophia.lab.support.files import locked, write_atomically
from sophia.lab.training.trackers import Trackers
from sophia.lab.training.workers import Crew, Events, cores

__all__ = ["sweep"]


def sweep(
    protocol: Protocol,
    *,
    out: Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    device: Device = "cpu",
    command: str = "sophia sweep",
    trackers: Sequence[str] = (),
    forecast: bool = False,
    console: Console,
) -> Path:
    """Do the trials that are missing and write down what came of them; return the folder. Nothing is written
    before everything is checked; with ``forecast`` nothing is written at all. With ``resume`` it must have
    been begun.
    """
    tracked = Trackers(tuple(trackers))
    tracked.check()
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}, and nobody would do the trials. Use 1 or more.")
    protocol.check()
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    ids.require(protocol.model.context, f"The text {protocol.data}")
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    named = dataclasses.replace(protocol, data=text.name)
    spaces = {label: protocol.space(label) for label in protocol.names}

    def trial(label: str, point: Mapping[str, Setting]) -> Run:
        return protocol.trial(label, point, data=data, device=device)

    # What cannot be planned is said before anything is written.
    typical = {label: trial(label, {n: kind.middle for n, kind in s.items()}) for label, s in spaces.items()}
    numerics = {label: n for label, run in typical.items() if (n := run.optimizer.numerics)}
    frozen = {
        "sweep.json": {
            "hash": named.hash,
            "protocol": to_json(named),
            # As lists: their order is that of the dimensions of the evenly spread points.
            "spaces": {
                label: [[name, to_json(kind)] for name, kind in s.items()] for label, s in spaces.items()
            },
            "data": plan.about(text, ids),
            "device": device,
        }
        # The trials that were told to Optuna are of these numbers.
        | ({"numerics": numerics} if numerics else {})
    }
    folder = out or Path("sweeps") / f"{protocol.name}-{text.name}-{named.hash}"
    begun = freeze.check(folder, frozen, what="sweep")
    freeze.begun(folder, begun, resume=resume, what="sweep")
    for note in reuse.check(begun_runs(spaces, trial, folder), folder / "runs"):
        console.print(note, highlight=False, markup=False, style="yellow")
    total = protocol.search.trials * len(spaces)
    at_once = min(workers or (1 if device == "cuda" else cores()), total)
    left = rounds(spaces, trial, protocol.search, folder)
    if forecast:
        _say_forecast(typical, left, folder, total, at_once, console)
        return folder
    with locked(folder, what="sweep"):
        freeze.write(folder, frozen)
        tracked = dataclasses.replace(tracked, group=folder.name, folder=folder)
        console.print(
            f"{protocol.search.trials} trials for each of {', '.join(spaces)} on {text.about}. "
            f"Records: {folder}",
            highlight=False,
        )
        for line in tracked.words():
            console.print(line, highlight=False, soft_wrap=True)
        try:
            _say_forecast(typical, left, folder, total, at_once, console)
            trials = search(
                spaces,
                trial,
                protocol.search,
                folder,
                workers=at_once,
                events=_Lines(console),
                trackers=tracked,
            )
        except Stopped as stopped:
            raise Stopped(f"{stopped}\nTo go on: {command}", signal=stopped.signal) from None
        except LabError as error:
            raise LabError(f"{error}\nTo try those again: {command}") from None
        _record(folder, protocol, trials)
    console.print(_table(spaces, trials))
    console.print(
        f"To compare with these settings: sophia compare --protocol {folder / 'tuned.toml'}",
        highlight=False,
        soft_wrap=True,
    )
    return folder


def _say_forecast(
    typical: Mapping[str, Run],
    left: Sequence[Sequence[str]],
    folder: Path,
    total: int,
    workers: int,
    console: Console,
) -> None:
    """Each trial with settings in the middle of its space."""
    with Crew(folder / "runs", workers=workers) as crew:
        say_forecast(
            [[comparison.Remaining(typical[name], step=0) for name in each] for each in left],
            crew.measure,
            records=folder / "runs",
            runs=total,
            workers=workers,
            report=False,
            ended=f"All {total} trials of {folder} have ended before.",
            console=console,
        )


class _Lines(Events):
    """A line for each trial that ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def ended(self, run: Run, result: EndRow) -> None:
        how = (
            "diverged" if result["loss"] is None else f"loss {result['loss']:.4f}, {result['seconds']:.0f} s"
        )
        self._console.print(
            f"{run.optimizer.contender}, lr {run.optimizer.settings['lr']:.3g}: {how}", highlight=False
        )

    def died(self, run: Run, attempt: int) -> None:
        self._console.print(f"{run.optimizer.contender}: its process died (attempt {attempt}); it goes on.")


def _record(folder: Path, protocol: Protocol, trials: Sequence[Trial]) -> None:
    lines = "".join(json.dumps(dataclasses.asdict(trial)) + "\n" for trial in trials)
    winners = {trial.contender: trial.point for label in protocol.names if (trial := best(trials, label))}
    tuned = "# Settings found by `sophia sweep`; the trials stand in trials.jsonl beside this file.\n"
    # With the spaces written out, a comparison can say which settings lie at their edge.
    searched = dataclasses.replace(
        protocol.search, spaces={label: protocol.space(label) for label in protocol.names}
    )
    tuned += text_of(dataclasses.replace(protocol.with_settings(winners), search=searched))
    write_atomically(folder / "tuned.toml", lambda file: file.write(tuned.encode()))
    write_atomically(
        folder / "trials.jsonl", lambda file: file.write(lines.encode())
    )  # last: it means "done"


def _table(spaces: Mapping[str, Any], trials: Sequence[Trial]) -> Table:
    table = Table(
        title="Best of each; * is at the edge of its space, so the optimum may lie outside",
        title_justify="left",
    )
    for title in ("contender", "best settings", "loss, nats", "trials", "diverged"):
        table.add_column(title, justify="left" if title in ("contender", "best settings") else "right")
    for label, space in spaces.items():
        mine = [t for t in trials if t.contender == label]
        winner = best(mine, label)
        edge = at_edge(space, winner.point) if winner else []
        table.add_row(
            label,
            ", ".join(f"{name} {value}{'*' * (name in edge)}" for name, value in winner.point.items())
            if winner
            else "none: every trial diverged",
            f"{winner.loss:.4f}" if winner else "",
            str(len(mine)),
            str(sum(t.loss is None for t in mine)),
        )
    return table
