"""A record of ``sophia bench`` as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sophia.lab.bench.methods import REFERENCE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["draw", "save", "table"]

Record = Mapping[str, Any]


def _ratio(value: Mapping[str, float] | float | None) -> str:
    number = value["median"] if isinstance(value, Mapping) else value
    if number is None:
        return ""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.3f}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """What stands in a row, behind its name."""
    return [
        _ratio(row["step"]),
        _ratio(row["training_step"]),
        f"+{row['refresh']:.2f}" if "refresh" in row else "",
        _ratio(row["amortised"]),
        f"{row['peak']:.2f}" if "peak" in row else "",
        f"{row['state_bytes']:.2f}",
    ]


def table(record: Record) -> Table:
    """The table, and below it what is missing and why."""
    from rich import box
    from rich.table import Table

    found = Table(title=_title(record), title_justify="left", caption_justify="left", box=box.SIMPLE)
    found.add_column("optimizer", no_wrap=True)
    heads = ("step", "training step", "a refresh adds", f"with k = {record['every']}", "peak memory")
    for title in (*heads, "bytes of state a parameter"):
        found.add_column(title, justify="right")
    for name, row in record["rows"].items():
        if "missing" not in row:
            found.add_row(name, *cells(row))
    missing = [f"{name}: {row['missing']}" for name, row in record["rows"].items() if "missing" in row]
    found.caption = "Ratios to torch's AdamW(fused=True); its own row is the control. " + (
        "Not timed: " + "; ".join(missing) + "." if missing else ""
    )
    return found


def _title(record: Record) -> str:
    where = record["environment"]
    shape = f"{record['model']}, {record['parameters'] / 1e6:.2f}M parameters in {record['tensors']} tensors"
    threads = f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}"
    return f"{shape}; {where['processor']}, {threads}, torch {where['torch']}"


def save(record: Record, path: Path) -> None:
    """Write the picture, as .png or .svg by its name; the same record gives the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from sophia.lab.report.loss_curves import STYLE

    with matplotlib.rc_context(STYLE):
        figure = draw(record)
        FigureCanvasAgg(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=140, metadata=metadata)


def draw(record: Record) -> Figure:
    """The step alone on a logarithmic axis, the training step with refreshes in per cent, peak and state."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from sophia.lab.report.colours import BASELINE, COLOURS
    from sophia.lab.report.loss_curves import GREY

    rows = {name: row for name, row in record["rows"].items() if "missing" not in row}
    figure = Figure(figsize=(11, 1.3 + 0.34 * len(rows)), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 0.8))
    for place, (name, row) in enumerate(rows.items()):
        own = BASELINE if name == REFERENCE else COLOURS[0] if name.startswith("sophia") else COLOURS[1]
        colour = own[0]  # on light paper
        step, training = row["step"], row["training_step"]
        left.plot([step["low"], step["high"]], [place] * 2, color=colour, lw=1.4)
        left.plot(step["median"], place, "o", color=colour, ms=6)
        _write(left, step["median"], place, _ratio(step))
        added = 100 * (row["amortised"] - 1)
        shift = 100 * (training["high"] - training["low"]) / 2
        middle.plot([added - shift, added + shift], [place] * 2, color=colour, lw=1.4)
        middle.plot(added, place, "o", color=colour, ms=6)
        _write(middle, added, place, f"{added:+.1f}%")
        right.barh(place, row["state_bytes"], 0.5, color=colour)
        peak = f"   peak {row['peak']:.2f}" if "peak" in row else ""
        _write(right, row["state_bytes"], place, f"{row['state_bytes']:.1f}{peak}")
    left.set_xscale("log")
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    left.set_yticks(range(len(rows)), list(rows))
    left.invert_yaxis()
    left.axvline(1, color=GREY, lw=0.8)
    middle.axvline(0, color=GREY, lw=0.8)
    for axes, title in (
        (left, "Step alone, over AdamW fused"),
        (middle, f"Training step, refreshes at k = {record['every']}"),
        (right, "State, bytes a parameter"),
    ):
        axes.grid(False, axis="y")
        axes.margins(x=0.25)
        axes.set_title(title, loc="left", fontsize=11, color="#333333")
    right.set_xlim(0, 1.9 * max(row["state_bytes"] for row in rows.values()))
    return figure


def _write(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
