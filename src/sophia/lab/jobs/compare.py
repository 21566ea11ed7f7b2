"""`sophia compare`: contenders on one text, equal budgets, and a verdict. Options are in ``commands``,
mathematics elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sophia.lab.analysis.search_notes import unsearched
from sophia.lab.config.field_types import Device
from sophia.lab.data import corpus, tokens
from sophia.lab.forecast import comparison
from sophia.lab.jobs import reuse
from sophia.lab.jobs.progress_bar import Display
from sophia.lab.jobs.say_forecast import say_forecast
from sophia.lab.protocols import freeze, plan
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.support.dataclass_json import to_json
from sophia.lab.support.errors import LabError, Stopped, UsageError
from sophia.lab.support.files import locked
from sophia.lab.training.run_folder import Record
from sophia.lab.training.trackers import Trackers
from sophia.lab.training.workers import Crew, cores

if TYPE_CHECKING:
    from sophia.lab.analysis.verdict import Row, Summary

__all__ = ["compare", "show"]


def compare(
    protocol: Protocol,
    *,
    out: Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    device: Device = "cpu",
    command: str = "sophia compare",
    trackers: Sequence[str] = (),
    forecast: bool = False,
    console: Console,
) -> Path:
    """Plan, run what has not been run, and report; return the folder. Nothing is written before everything is
    checked; with ``forecast`` nothing is written at all. With ``resume`` it must have been begun.
    """
    tracked = Trackers(tuple(trackers))
    tracked.check()
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}, and nobody would do the runs. Use 1 or more.")
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    ids.require(protocol.model.context, f"The text {protocol.data}")
    planned = plan.make_plan(protocol, text, ids, device=device)
    folder = out or Path("comparisons") / f"{protocol.name}-{text.name}-{planned.hash}"
    frozen = {
        "protocol.json": {"hash": planned.protocol.hash, "protocol": to_json(planned.protocol)},
        "comparison.json": planned.to_json(),
    }
    reuse.check_names(folder, planned)
    started = freeze.check(folder, frozen, what="comparison")
    freeze.begun(folder, started, resume=resume, what="comparison")
    for note in reuse.check(planned.runs, folder / "runs"):
        console.print(note, highlight=False, markup=False, style="yellow")
    at_once = min(workers or (1 if device == "cuda" else cores()), len(planned.runs))
    if forecast:
        with Crew(folder / "runs", workers=at_once) as crew:
            _say_forecast(folder, planned, crew, at_once, console)
        return folder
    tracked = replace(tracked, group=folder.name, folder=folder)
    with locked(folder, what="comparison"):
        freeze.write(folder, frozen)
        _run(folder, planned, workers=at_once, command=command, trackers=tracked, console=console)
        show(folder, console)
    return folder


def _run(
    folder: Path, planned: plan.Plan, *, workers: int, command: str, trackers: Trackers, console: Console
) -> None:
    runs = folder / "runs"
    done = [run.hash for run in planned.runs if Record(runs, run).result() is not None]
    if len(done) == len(planned.runs):
        console.print(f"All {len(done)} runs of {folder} have ended before.", highlight=False)
        return
    if any(Record(runs, run).begun for run in planned.runs):
        console.print(
            f"Going on: {len(done)} of {len(planned.runs)} runs have ended before.", highlight=False
        )
    size = planned.runs[0]
    console.print(
        f"{' against '.join(reversed(planned.contenders))} on {planned.data['about']}: "
        f"{len(planned.runs)} runs, {len(planned.protocol.seeds)} seeds, {workers} at a time. "
        f"Records: {folder}",
        highlight=False,
    )
    console.print(
        f"GPT-2 of {size.model.layers} layers, width {size.model.width}; batches of {size.batch} x "
        f"{size.model.context} tokens; budgets {', '.join(map(str, planned.budgets))} steps, "
        "each with a whole learning-rate schedule.",
        highlight=False,
    )
    if note := unsearched(to_json(planned.protocol)):
        console.print(note, highlight=False, style="yellow")
    for line in trackers.words():
        console.print(line, highlight=False, soft_wrap=True)
    try:
        with Crew(runs, workers=workers, trackers=trackers) as crew:
            _say_forecast(folder, planned, crew, workers, console)
            with Display(console, planned.runs, done) as display:
                crew.do(planned.runs, display)
    except Stopped as stopped:
        raise Stopped(f"{stopped}\nTo go on: {command}", signal=stopped.signal) from None
    except LabError as error:
        raise LabError(f"{error}\nTo try those again: {command}") from None


def _say_forecast(folder: Path, planned: plan.Plan, crew: Crew, workers: int, console: Console) -> None:
    say_forecast(
        [comparison.remaining(planned.runs, folder / "runs")],
        crew.measure,
        records=folder / "runs",
        runs=len(planned.runs),
        workers=workers,
        report=True,
        ended=f"All {len(planned.runs)} runs of {folder} have ended before.",
        console=console,
    )


def show(folder: Path, console: Console) -> None:
    """Print the table and the verdicts of a comparison's records, and write its report and pictures."""
    from sophia.lab.analysis.verdict import summarise
    from sophia.lab.analysis.verdict_words import spent_sentence
    from sophia.lab.report.page import write_report

    summary = summarise(folder)
    console.print(_table(summary))
    console.print()
    if summary.notice:
        console.print(summary.notice, highlight=False, style="yellow")
    for verdict in summary.verdicts:
        console.print(verdict.sentence, highlight=False)
    if summary.power:
        console.print(summary.power, highlight=False, style="dim")
    target = summary.evidence.target
    if target is not None:
        console.print(reached(summary.rows, target), highlight=False)
        between = "; ".join(f"{r.contender} {r.words}" for r in summary.reached)
        console.print(f"Read off each contender's curve of end losses: {between}.", highlight=False)
    console.print(spent_sentence(summary.spent), highlight=False, style="dim")
    files = write_report(folder)
    pictures = [files.curves, *(path for path in files.others if path.suffix == ".png")]
    console.print(
        f"Report:   {files.html}\nPictures: {', '.join(map(str, pictures))}", highlight=False, soft_wrap=True
    )


def reached(rows: Sequence[Row], target: float) -> str:
    """The smallest budget whose runs end at the target loss or below, on average over seeds. Only the ends of
    whole schedules count: what a longer run has seen on its way is not comparable.
    """
    first: dict[str, int | None] = {row.contender: None for row in rows}
    for row in sorted(rows, key=lambda row: -row.steps):
        if row.loss is not None and row.loss <= target and not row.diverged:
            first[row.contender] = row.steps
    said = [f"{name} {'not' if steps is None else f'{steps} steps'}" for name, steps in first.items()]
    return f"Smallest budget that reaches {target:g} nats: {', '.join(said)}."


def _table(summary: Summary) -> Table:
    # 80 columns hold it, names of fifteen letters whole: half a name is nobody's.
    table = Table(
        title="End of training, mean over seeds (± standard deviation)",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("contender", overflow="fold")
    for title in ("steps", "loss, nats", "bits/byte", "gradients", "seconds", "unclipped"):
        table.add_column(title, justify="right", overflow="fold")
    for row in summary.rows:
        loss = _number(row.loss, ".3f") + (f" ± {row.sd:.3f}" if row.sd is not None else "")
        table.add_row(
            row.contender,
            f"{row.steps}",
            f"{loss} ({row.diverged} diverged)" if row.diverged else loss,
            _number(row.bits_per_byte, ".3f"),
            _number(row.gradient_evaluations, ".0f"),
            _number(row.seconds, ".0f"),
            _number(row.unclipped, ".1%"),
        )
    return table


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
