"""`sophia train`: one run of a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sophia.lab.config.field_types import Device
from sophia.lab.config.run import Data, Run
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.forecast import comparison
from sophia.lab.jobs import reuse
from sophia.lab.jobs.say_forecast import say_forecast
from sophia.lab.protocols import freeze
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.support.errors import LabError, Stopped, UsageError
from sophia.lab.support.signals import requests
from sophia.lab.training import loop, pace
from sophia.lab.training.pace import Pace
from sophia.lab.training.run_folder import Record
from sophia.lab.training.trackers import Trackers

__all__ = ["train_one"]


def train_one(
    contender: str,
    *,
    protocol: Protocol,
    seed: int,
    steps: int | None,
    out: Path,
    resume: bool,
    device: Device,
    command: str,
    trackers: Sequence[str] = (),
    forecast: bool = False,
    console: Console,
) -> None:
    """Train, show how it goes, and print where the records are; with ``forecast`` only say what that would
    take.
    """
    tracked = Trackers(tuple(trackers), group=out.name, folder=out)
    tracked.check()
    protocol.check()
    text = corpus.load(protocol.data)
    config = protocol.run(
        contender,
        data=Data(text.name, text.sha256, vocabulary.SHA256),
        seed=seed,
        steps=max(protocol.budgets) if steps is None else steps,
        device=device,
    )
    ids = tokens.encode(text)
    ids.require(config.model.context, f"The text {protocol.data}")
    record = Record(out, config)
    freeze.begun(record.folder, record.begun, resume=resume, what="run")
    for note in reuse.check([config], out):
        console.print(note, highlight=False, markup=False, style="yellow")
    if forecast:
        _say_forecast(config, ids, out, console)
        return
    if record.result() is None:
        for line in tracked.words():
            console.print(line, highlight=False, soft_wrap=True)
        _say_forecast(config, ids, out, console)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(None),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar, requests() as stop:
        task = bar.add_task(contender, total=config.steps)

        def report(progress: loop.Progress) -> None:
            share = "" if progress.unclipped is None else f", {progress.unclipped:.1%} unclipped"
            bar.update(
                task, completed=progress.step, description=f"{contender}: loss {progress.loss:.3f}{share}"
            )

        try:
            result = loop.train(config, out, ids, stop=stop, report=report, trackers=tracked)
        except Stopped as stopped:
            raise Stopped(f"{stopped}\nTo go on: {command}", signal=stopped.signal) from None
    if result["status"] == "finished":
        loss, bits = result["loss"], result["bits_per_byte"]
        end = f"loss {loss:.4f} nats, {bits:.4f} bits per byte, {result['seconds']:.0f} s"
    else:
        end = f"diverged after {result['steps']} steps"
    console.print(
        f"{contender}, {config.steps} steps, seed {seed}: {end}. Records: {record.folder}", highlight=False
    )


def _say_forecast(config: Run, ids: tokens.Tokens, out: Path, console: Console) -> None:
    def measure(runs: Sequence[Run]) -> list[tuple[Run, Pace | str]]:
        with requests() as stop:
            try:
                return [(run, pace.measure(run, ids, stop=stop)) for run in runs]
            except Stopped as stopped:
                raise Stopped("Stopped before the first step.", signal=stopped.signal) from None
            except UsageError:
                raise
            except LabError as error:
                return [(config, str(error))]

    say_forecast(
        [comparison.remaining([config], out)],
        measure,
        records=out,
        runs=1,
        workers=1,
        report=False,
        ended=f"{Record(out, config).folder} has ended before.",
        console=console,
    )
