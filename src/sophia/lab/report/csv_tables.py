"""A comparison's records as two CSV files, for a spreadsheet, pandas or R."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sophia.lab.analysis.read_records import Evidence, read_evidence
from sophia.lab.analysis.verdict import Row, judge
from sophia.lab.support.files import write_atomically

__all__ = ["write_csv"]


def write_csv(folder: Path) -> tuple[Path, Path]:
    """Write ``ends.csv`` (contender x budget, means over seeds) and ``curves.csv`` (all logged rows); return
    both.
    """
    evidence = read_evidence(folder)
    ends, curves = folder / "ends.csv", folder / "curves.csv"
    names = [f.name for f in dataclasses.fields(Row)]
    _write(ends, names, (dataclasses.asdict(row) for row in judge(evidence).rows))
    rows = list(_logged(evidence))
    first = ["contender", "seed", "budget", "kind", "step", "loss"]
    rest = sorted({key for row in rows for key in row} - set(first))
    _write(curves, [*first, *rest], rows)
    return ends, curves


def _logged(evidence: Evidence) -> Iterable[dict[str, Any]]:
    for run in evidence.runs:
        about = {"contender": run.contender, "seed": run.seed, "budget": run.steps}
        for row in (*run.train, *run.evaluations):
            yield {**row, **about}


def _write(path: Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row.get(name)) for name in names})
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _cell(value: Any) -> Any:
    # A cell that begins like a formula is run by spreadsheets; names in records may be somebody else's.
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t" else value
