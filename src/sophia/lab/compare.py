"""`sophia compare`: contenders on one text, equal budgets, and a verdict. Parsing is in ``cli.py``,
mathematics elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sophia.lab import corpus, plan, recipes, tokens
from sophia.lab.config import Setting
from sophia.lab.errors import LabError, Stopped, UsageError
from sophia.lab.files import locked, write_json
from sophia.lab.progress import Display
from sophia.lab.record import Record, read_json
from sophia.lab.workers import cores, execute

if TYPE_CHECKING:
    from sophia.lab.statistics import Summary

__all__ = ["compare"]


def compare(
    contenders: Sequence[str],
    *,
    preset: str,
    seeds: int | None,
    data: str,
    over: Mapping[str, Mapping[str, Setting]],
    budgets: Sequence[int] = (),
    out: Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    command: str = "sophia compare",
    console: Console,
) -> Path:
    """Plan, run what has not been run, and report; return the folder. Nothing is written before everything is
    checked.
    """
    size = recipes.preset(preset)
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}, and nobody would do the runs. Use 1 or more.")
    text = corpus.load(data)
    ids = tokens.encode(text)
    ids.require(size.model.context, f"The text {data}")
    planned = plan.make_plan(
        text,
        ids,
        preset=preset,
        contenders=contenders,
        seeds=seeds,
        budgets=budgets,
        over=over,
        device=device,
    )
    folder = out or Path("comparisons") / f"{preset}-{text.name}-{planned.hash}"
    started = _check_folder(folder, planned, resume=resume, command=command)
    at_once = workers or (1 if device == "cuda" else cores())
    with locked(folder, what="comparison"):
        if not started:
            write_json(folder / "comparison.json", planned.to_json())
        _run(folder, planned, workers=min(at_once, len(planned.runs)), command=command, console=console)
        _report(folder, console)
    return folder


def _check_folder(folder: Path, planned: plan.Plan, *, resume: bool, command: str) -> bool:
    """Whether this comparison has been started there. Raises ``UsageError`` if going on would lose or mix
    something.
    """
    path = folder / "comparison.json"
    if not path.exists():
        if folder.is_file() or (folder.is_dir() and any(p.name != "lock" for p in folder.iterdir())):
            raise UsageError(
                f"{folder} is there already and holds no comparison; writing into it would mix two things. "
                "Give another folder with --out."
            )
        return False
    seen, wanted = read_json(path), planned.to_json()
    if seen != wanted:
        keys = ", ".join(k for k in sorted({*seen, *wanted}) if k != "runs" and seen.get(k) != wanted.get(k))
        raise UsageError(
            f"{folder} holds another comparison: it differs in {keys or 'its runs'}. Going on would mix the "
            f"two. "
            "Give the options it was started with, or another folder with --out."
        )
    if not resume and any(Record(folder / "runs", run).result() is None for run in planned.runs):
        raise UsageError(
            f"{folder} holds this comparison, begun and not finished; it is neither repeated nor continued "
            f"unasked. "
            f"To go on: {command} --resume"
        )
    return True


def _run(folder: Path, planned: plan.Plan, *, workers: int, command: str, console: Console) -> None:
    runs = folder / "runs"
    done = [run.hash for run in planned.runs if Record(runs, run).result() is not None]
    if len(done) == len(planned.runs):
        console.print(f"All {len(done)} runs of {folder} have ended before.", highlight=False)
        return
    size = planned.runs[0]
    console.print(
        f"{' against '.join(reversed(planned.contenders))} on {planned.data['about']}: "
        f"{len(planned.runs)} runs, {len(planned.seeds)} seeds, {workers} at a time. Records: {folder}",
        highlight=False,
    )
    console.print(
        f"GPT-2 of {size.model.layers} layers, width {size.model.width}; batches of {size.batch} x "
        f"{size.model.context} tokens; budgets {', '.join(map(str, planned.budgets))} steps, "
        "each with a whole learning-rate schedule.",
        highlight=False,
    )
    try:
        with Display(console, planned.runs, done, workers=workers) as display:
            execute(planned.runs, runs, workers=workers, events=display)
    except Stopped as stopped:
        raise Stopped(f"{stopped}\nTo go on: {_resuming(command)}", signal=stopped.signal) from None
    except LabError as error:
        raise LabError(f"{error}\nTo try those again: {_resuming(command)}") from None


def _resuming(command: str) -> str:
    return command if "--resume" in command.split() else f"{command} --resume"


def _report(folder: Path, console: Console) -> None:
    from sophia.lab.report import write_report
    from sophia.lab.statistics import summarise

    summary = summarise(folder)
    console.print(_table(summary))
    for verdict in summary.verdicts:
        console.print(verdict.sentence, highlight=False)
    if summary.power:
        console.print(summary.power, highlight=False, style="dim")
    files = write_report(folder)
    console.print(f"Report:  {files.html}\nPicture: {files.curves}", highlight=False, soft_wrap=True)


def _table(summary: Summary) -> Table:
    table = Table(title="End of training, mean over seeds (± standard deviation)", title_justify="left")
    table.add_column("contender")
    for title in ("steps", "loss, nats", "bits per byte", "gradient evaluations", "seconds", "unclipped"):
        table.add_column(title, justify="right")
    for row in summary.rows:
        loss = _number(row.loss, ".4f") + (f" ± {row.sd:.4f}" if row.sd is not None else "")
        table.add_row(
            row.contender,
            f"{row.steps}",
            f"{loss} ({row.diverged} diverged)" if row.diverged else loss,
            _number(row.bits_per_byte, ".4f"),
            _number(row.gradient_evaluations, ".0f"),
            _number(row.seconds, ".0f"),
            _number(row.unclipped, ".1%"),
        )
    return table


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
