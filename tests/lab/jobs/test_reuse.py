"""Finished runs that other code made: they are never silently taken for today's."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from sophia import numerics
from sophia.lab.jobs import compare, reuse
from sophia.lab.jobs.train import train_one
from sophia.lab.optimizers import table
from sophia.lab.protocols import plan, protocol_file
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import Record

RESULTS = Path(__file__).parents[3] / "results"


TODAY = numerics.words(numerics.versions("gnb"))


def copy_of(name, tmp_path):
    """A committed comparison, where it may be written."""
    if not RESULTS.exists():
        pytest.skip("no results here: a source distribution without them")
    found = next(path.parent for path in RESULTS.rglob("comparison.json") if path.parent.name == name)
    return Path(shutil.copytree(found, tmp_path / name))


def console():
    return Console(file=io.StringIO(), width=400)


def protocol_of(folder):
    """The protocol that a comparison was made by."""
    return from_json(Protocol, json.loads((folder / "protocol.json").read_text())["protocol"])


def test_the_record_of_older_numbers_is_not_todays_verdict(tmp_path):
    """Else `sophia compare` would repeat a verdict that today's code does not give."""
    folder = copy_of("schedule-cosine", tmp_path)
    with pytest.raises(UsageError) as refused:
        compare.compare(protocol_of(folder), out=folder, console=console())
    said = f"9 of 18 runs were made by other code (6bf50a1, numerics gnb 2; today {TODAY}"
    assert said in str(refused.value)
    assert "another folder with --out" in str(refused.value)
    shown = console()
    compare.show(folder, shown)
    out = shown.file.getvalue()
    assert out.index(said) < out.index("slower than adamw"), "before the verdict"
    assert "What is said of sophia-g is about that code" in out
    page = (folder / "report.html").read_text()
    assert page.index(said) < page.index('class="verdicts"')


def test_older_names_with_todays_numbers_are_said_to_be_that(tmp_path, monkeypatch):
    """Else runs of today's numbers would be called stale because of their names."""
    monkeypatch.setitem(numerics.VERSIONS, "gnb", 2)  # the record's
    folder = copy_of("schedule-cosine", tmp_path)
    with pytest.raises(UsageError, match=r"today's \(gnb 2\), so nothing is to be done again"):
        compare.compare(protocol_of(folder), out=folder, console=console())
    shown = console()
    compare.show(folder, shown)
    assert "other code" not in shown.file.getvalue()


@pytest.fixture
def begun(tmp_path, text, ids):
    """A comparison of one budget and seed whose runs have ended; (folder, protocol, runs)."""
    protocol = protocol_file.chosen("tiny", None).with_contenders(["sophia-g"])
    protocol = dataclasses.replace(protocol, budgets=(4,), seeds=(1,), data=text.name)
    planned = plan.make_plan(protocol, text, ids)
    for run in planned.runs:
        train(run, tmp_path / "c" / "runs", ids)
    return tmp_path / "c", planned.runs


def edited(folder, run, **changes):
    """Write other values into the environment of a result."""
    path = Record(folder / "runs", run).folder / "result.json"
    result = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            result["environment"].pop(key)
        else:
            result["environment"][key] = value
    path.write_text(json.dumps(result))


def test_a_result_says_what_made_it(begun):
    """Else nobody could tell which code and which path of the step a number is of."""
    folder, (adamw, sophia_g) = begun
    environment = Record(folder / "runs", sophia_g).result()["environment"]
    assert environment["numerics"] == f"{TODAY}, paper 1"
    assert environment["kernels"] in ("fused_cpu", "foreach")
    assert len(environment["fingerprint"]) == 5
    environment = Record(folder / "runs", adamw).result()["environment"]
    assert len(environment["fingerprint"]) == 5
    assert not {"numerics", "kernels"} & set(environment)
    assert reuse.check((adamw, sophia_g), folder / "runs") == []


def test_finished_runs_of_other_code_are_refused(begun):
    """Else one verdict would be about two codes."""
    folder, runs = begun
    made = Record(folder / "runs", runs[1]).result()["environment"]["fingerprint"]
    near = [value * (1 + 1e-8) for value in made]
    edited(folder, runs[1], fingerprint=near)
    assert reuse.check(runs, folder / "runs") == [], "rounding is no other code"
    edited(folder, runs[1], fingerprint=[*made[:-1], made[-1] * 1.001], commit="1234567")
    with pytest.raises(UsageError) as refused:
        reuse.check(runs, folder / "runs")
    assert "1 of 2 finished runs was made by other code (1234567)" in str(refused.value)
    assert "1.0e-03 apart" in str(refused.value)
    assert runs[1].hash in str(refused.value), "which to delete"
    shutil.rmtree(folder / "runs" / runs[1].hash)
    assert reuse.check(runs, folder / "runs") == []


def test_what_cannot_be_compared_is_said(begun):
    """Else an older record, or another path of the step, would pass for today's without a word."""
    folder, runs = begun
    edited(folder, runs[0], fingerprint=None, commit="7654321")
    edited(folder, runs[1], kernels="foreach_of_old")
    unmarked, rounded = reuse.check(runs, folder / "runs")
    assert unmarked.startswith("1 of 2 finished runs was recorded without a fingerprint (7654321)")
    assert "made by another kernel of the step (foreach_of_old, and today it is " in rounded


def test_train_and_compare_look_before_they_count_a_run_as_ended(begun, text_file, tmp_path):
    """Else the check would be there and nobody would ask it."""
    folder, runs = begun
    for run in runs:
        edited(folder, run, fingerprint=[1.0])
    protocol = protocol_file.chosen("tiny", None).with_contenders(["sophia-g"])
    protocol = dataclasses.replace(protocol, budgets=(4,), seeds=(1,), data=str(text_file))
    with pytest.raises(UsageError, match="2 of 2 finished runs were made by other code"):
        compare.compare(protocol, out=folder, console=console())
    assert not (folder / "comparison.json").exists(), "nothing is written before it is checked"
    arguments = {"protocol": protocol, "seed": 1, "steps": 4, "resume": False, "device": "cpu"}
    with pytest.raises(UsageError, match="1 of 1 finished runs was made by other code"):
        train_one("adamw", out=folder / "runs", command="", console=console(), **arguments)


def test_a_run_of_other_numbers_has_another_name(begun, ids):
    """Else the second would get the result of the first, or a half-done one go on with other numbers."""
    folder, (_, run) = begun
    assert run.optimizer.numerics == TODAY
    assert to_json(run)["optimizer"]["numerics"] == TODAY
    older = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, numerics=""))
    assert older.hash != run.hash
    assert "numerics" not in to_json(older)["optimizer"], "first versions keep the names of their runs"
    with pytest.raises(
        LabError, match=f"planned with the numerics of all first versions, and now they are {TODAY}"
    ):
        table.of(older.optimizer)
    with pytest.raises(LabError, match="Going on would mix two optimizers"):
        train(older, folder / "runs", ids)
