"""`sophia report`: a comparison drawn again from its records, and its tables as CSV."""

import csv
import json

import pytest
from synthetic import Planted, write_comparison

from sophia.lab import cli
from sophia.lab.analysis.verdict import summarise
from sophia.lab.report.csv_tables import write_csv


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_what_the_summary_and_the_logs_hold(tmp_path):
    """A spreadsheet that disagrees with the report."""
    folder = write_comparison(tmp_path / "c", Planted())
    ends, curves = write_csv(folder)
    rows = summarise(folder).rows
    assert [(r["contender"], int(r["steps"]), float(r["loss"])) for r in read(ends)] == [
        (r.contender, r.steps, r.loss) for r in rows
    ]
    logged = read(curves)
    lines = sum(
        len((folder / "runs" / run["run"] / "log.jsonl").read_text().splitlines())
        for run in json.loads((folder / "comparison.json").read_text())["runs"]
    )
    assert len(logged) == lines
    assert {row["kind"] for row in logged} == {"train", "eval"}
    assert {row["contender"] for row in logged} == {"adamw", "sophia-g"}


def test_a_name_that_is_a_formula_is_text(tmp_path):
    """Records come from other people: a spreadsheet would run a cell that begins with an equals sign."""
    folder = write_comparison(tmp_path / "c", Planted())
    run = next((folder / "runs").iterdir())
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "train", "step": 1, "loss": 1.0, "note": "=HYPERLINK(1)"}) + "\n")
    assert "\n=" not in (text := write_csv(folder)[1].read_text())
    assert ",=" not in text
    assert "'=HYPERLINK(1)" in text


def test_the_command_rebuilds_the_report_without_any_run(tmp_path, capsys):
    """A report that can only be drawn by the process that trained is lost with it."""
    folder = write_comparison(tmp_path / "c", Planted())
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    cli.main(["report", str(folder), "--csv"])
    said = capsys.readouterr().out
    assert "slower" in said
    assert {"report.html", "curves.png", "curves.svg", "ends.csv", "curves.csv"} <= {
        path.name for path in folder.iterdir()
    }
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}


@pytest.mark.parametrize("arguments", [[], ["nowhere"]])
def test_no_comparison_there_is_said(tmp_path, monkeypatch, capsys, arguments):
    """A traceback, or an empty report."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *arguments])
    assert ended.value.code in (1, 2)
    assert "sophia" in capsys.readouterr().err
