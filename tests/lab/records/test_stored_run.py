import json
import shutil

import pytest
from synthetic import Planted, write_comparison

from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.jobs.pack import pack
from sophia.lab.records import pack_file, reading
from sophia.lab.records.pack_file import NAME, read_pack, read_pack_once
from sophia.lab.records.stored_run import stored_runs


@pytest.fixture
def packed(tmp_path):
    """A packed comparison."""
    folder = write_comparison(tmp_path / "a")
    pack(folder)
    return folder


def change(folder, number, **parts):
    """Give a line of a pack other parts."""
    lines = (folder / NAME).read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | parts)
    (folder / NAME).write_text("\n".join(lines) + "\n")


def test_folders_and_packs_under_a_path_give_the_same_runs(tmp_path):
    """A check over all records that passes by those that were packed."""
    write_comparison(tmp_path / "results" / "one", Planted(seeds=(1,)))
    write_comparison(tmp_path / "results" / "deep" / "two", Planted(seeds=(2,)))
    before = list(stored_runs(tmp_path / "results"))
    assert len(before) == 8
    assert all(run.started and run.ended and run.rows and run.attempts for run in before)
    pack(tmp_path / "results" / "one")
    after = list(stored_runs(tmp_path / "results"))
    for key in ("name", "config", "result", "attempts", "rows", "problems"):
        assert [getattr(run, key) for run in after] == [getattr(run, key) for run in before]
    assert {run.place.name for run in after if run.place.parent.name == "one"} == {NAME}
    assert [run.name for run in stored_runs(tmp_path / "results" / "one" / NAME)] == [
        run.name for run in after if run.place.name == NAME
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("3", "it is no object of run, config"),
        ('{"run": "a"}', "it is no object of run, config"),
        (
            '{"run": "../../etc", "config": {}, "result": {}, "attempts": [], "log": {}}',
            "may lead out of its folder",
        ),
        ('{"run": 3, "config": {}, "result": {}, "attempts": [], "log": {}}', "may lead out of its folder"),
        ("", "it is not JSON"),
    ],
)
def test_a_bad_line_is_a_problem_with_its_number(packed, line, words):
    """A hostile pack that ends in a traceback, names a path of its choice, or loses a run in silence."""
    with (packed / NAME).open("a") as file:
        file.write(f"{line}\n")
    evidence = read_evidence(packed)
    assert any(f"line 9 of {NAME} was left out" in p and words in p for p in evidence.problems)
    assert all(run.status == "finished" for run in evidence.runs)
    assert next(run for run in stored_runs(packed) if not run.name).problems == evidence.problems


def test_a_line_that_stands_twice_is_a_problem(packed):
    """Another result under the name of a run."""
    first = (packed / NAME).read_text().splitlines()[0]
    with (packed / NAME).open("a") as file:
        file.write(first.replace('"finished"', '"diverged"') + "\n")
    evidence = read_evidence(packed)
    assert "a second time" in evidence.problems[0]
    assert all(run.status == "finished" for run in evidence.runs)


@pytest.mark.parametrize(
    ("parts", "words", "status"),
    [
        ({"result": None}, "its result in runs.jsonl could not be used: it is no object", "unfinished"),
        ({"result": {"status": "finished", "loss": float("nan")}}, "no finite number", "diverged"),
        ({"result": {"status": "<script>"}}, "unknown status '<script>'", "unfinished"),
        ({"config": [1]}, "its config in runs.jsonl could not be used", "finished"),
        ({"log": {"order": [9], "tables": []}}, "a table that is not there", "finished"),
        ({"log": {"order": [0, 0], "tables": [{"step": [1, "x"]}]}}, "1 row(s) of its log", "finished"),
        ({"attempts": 7, "log": {"order": [], "tables": [{"kind": "train"}]}}, "", "finished"),
    ],
)
def test_a_damaged_run_of_a_pack_is_named(packed, parts, words, status):
    """A damaged part that hides the other runs, or is hidden."""
    name = json.loads((packed / NAME).read_text().splitlines()[0])["run"]
    change(packed, 0, **parts)
    evidence = read_evidence(packed)
    assert [run.status for run in evidence.runs if run.name == name] == [status]
    assert sum(run.status == "finished" for run in evidence.runs) >= 7
    if words:
        (problem,) = evidence.problems
        assert name in problem
        assert words in problem


def test_a_pack_that_leads_out_of_the_folder_is_not_read(packed, tmp_path):
    """A record from somebody else that shows files of this machine."""
    shutil.move(packed / NAME, tmp_path / "outside.jsonl")
    (packed / NAME).symlink_to(tmp_path / "outside.jsonl")
    evidence = read_evidence(packed)
    assert evidence.problems == (f"{NAME} could not be used: it is a link that leads out of the folder",)
    assert {run.status for run in evidence.runs} == {"missing"}
    (packed / NAME).unlink()
    (packed / NAME).symlink_to(NAME)  # a circle
    assert f"{NAME} could not be used" in read_evidence(packed).problems[0]


def test_a_pack_that_is_too_large_is_not_read(packed, monkeypatch):
    """A page that no browser opens."""
    monkeypatch.setattr(reading, "MOST_BYTES", 1 << 10)
    assert f"{NAME} could not be used: it is larger than" in read_pack(packed, packed / NAME).problems[0]


def test_a_changed_pack_is_read_again(packed, monkeypatch):
    """A plan that asks an old copy; or that reads the file once for each of its runs."""
    first = read_pack_once(packed / NAME)
    monkeypatch.setattr(pack_file, "read_text", None)  # now it cannot be read
    assert read_pack_once(packed / NAME) is first
    monkeypatch.undo()
    change(packed, 0, result={"status": "diverged", "loss": None})
    assert read_pack_once(packed / NAME).runs != first.runs
