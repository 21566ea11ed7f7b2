"""The command that measures on a GPU, rehearsed at toy size: what it writes, what it does again, and what it
calls wrong. None of its numbers is held here.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sophia import Sophia
from sophia.step.kernels import foreach

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = ["environment", "correctness", "step-ratios", "whole-step", "graphs", "race"]

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="the benchmarks are not in the source distribution"
)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def dry_run(path):
    command = [sys.executable, str(FOLDER / "gpu_day.py"), "--dry-run", "--out", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    path = tmp_path_factory.mktemp("day") / "day.jsonl"
    return path, dry_run(path)


@pytest.fixture
def day(monkeypatch):
    """The script as a module; its own imports lie beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_day

    return gpu_day


@pytest.fixture
def of(day, monkeypatch, tmp_path):
    """``of(parts, *arguments)``: the exit code and the rows of a dry run of other parts."""

    def run(parts, *arguments):
        monkeypatch.setattr(day, "PARTS", parts)
        path = tmp_path / "day.jsonl"
        code = day.main(["--dry-run", "--out", str(path), *arguments])
        return code, rows_of(path)

    return run


def test_all_parts_are_in_the_file_and_a_summary_at_its_end(rehearsed):
    path, done = rehearsed
    assert done.returncode == 0, done.stderr
    rows = rows_of(path)
    assert [row["part"] for row in rows] == [*PARTS, "summary"]
    assert all(row["ok"] for row in rows[:-1])
    assert rows[-1]["wrong"] == []


def test_no_row_of_a_part_has_an_error(rehearsed):
    """A way that cannot run at all, hidden among those that do."""
    assert '"error"' not in rehearsed[0].read_text()


def test_all_contenders_take_equally_many_steps(rehearsed):
    race = rows_of(rehearsed[0])[PARTS.index("race")]
    assert {len(own["losses"]) for own in race["contenders"].values()} == {race["steps"]}


def test_nothing_is_done_again(rehearsed):
    path, _ = rehearsed
    before = path.read_bytes()
    assert dry_run(path).returncode == 0
    assert path.read_bytes() == before


def test_a_wrong_step_is_found(day, monkeypatch, tmp_path):
    """A check that passes whatever the device computes."""
    step = foreach.step

    def wrong(params, grads, exp_avgs, hessians, settings, **rest):
        step(params, grads, exp_avgs, hessians, settings._replace(gamma=1.1 * settings.gamma), **rest)

    monkeypatch.setattr(foreach, "step", wrong)
    path = tmp_path / "day.jsonl"
    assert day.main(["--dry-run", "--out", str(path), "--only", "correctness"]) == 1
    row, summary = rows_of(path)
    assert {case["path"] for case in row["rows"] if not case["ok"]} == {"foreach"}
    assert summary["wrong"] == ["correctness"]


def test_a_step_that_no_graph_could_capture_is_found(day, monkeypatch, tmp_path):
    """The host waits for the device in it, which a CPU shows too."""
    step = Sophia.step

    def reading(self, closure=None):
        float(torch.ones(()))
        return step(self, closure)

    monkeypatch.setattr(Sophia, "step", reading)
    path = tmp_path / "day.jsonl"
    assert day.main(["--dry-run", "--out", str(path), "--only", "graphs"]) == 1
    rows = rows_of(path)[0]["rows"]
    assert [name for name, row in rows.items() if row.get("numbers_read")] == [
        "graph, paper",
        "graph, paper, one launch",
        "graph, spectral",
    ]


def test_a_part_that_fails_stops_no_other_and_is_done_again(of):
    def fails(scene):
        raise ZeroDivisionError("at once")

    def works(scene):
        return {"says": "done"}

    code, rows = of({"first": (fails, 5, False), "second": (works, 5, True)})
    assert code == 0
    assert [row["ok"] for row in rows[:2]] == [False, True]
    assert "at once" in rows[0]["error"]
    code, rows = of({"first": (works, 5, False), "second": (fails, 5, True)})
    assert code == 0
    assert [row["part"] for row in rows] == ["first", "second", "summary", "first", "summary"]


def test_an_error_in_a_part_that_judges_is_a_wrong_one(of):
    def fails(scene):
        raise ZeroDivisionError

    assert of({"first": (fails, 5, True)})[0] == 1


def test_a_part_that_hangs_is_stopped(of):
    """One compiler that does not end would take the eight minutes."""

    def hangs(scene):
        try:
            time.sleep(60)
        except Exception:  # what a library does around a call that fails
            return {"says": "swallowed"}

    code, rows = of({"first": (hangs, 0.2, False)})
    assert code == 0
    assert rows[0]["error"].startswith("OutOfTime")


def test_without_time_left_a_part_is_not_begun(of):
    def works(scene):
        return {"says": "done"}

    _, rows = of({"first": (works, 5, False)}, "--minutes", "0")
    assert "no time was left" in rows[0]["error"]


def test_a_dry_run_and_a_measurement_are_not_mixed(day, tmp_path, capsys):
    path = tmp_path / "day.jsonl"
    path.write_text(json.dumps({"part": "race", "dry_run": False, "ok": True}) + "\n")
    assert day.main(["--dry-run", "--out", str(path)]) == 2
    assert "one file cannot be both" in capsys.readouterr().err


def test_files_that_are_not_there_are_refused_before_the_first_part(day, tmp_path, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path / "day.jsonl"), "--tokens", str(tmp_path / "no.bin")]
    assert day.main(arguments) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(day, tmp_path, capsys):
    assert day.main(["--out", str(tmp_path / "day.jsonl")]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_the_clock_of_events_adds_up_short_spans(day, monkeypatch):
    """A span since the start would be a float32 of milliseconds: after a minute, steps of 8 microseconds."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.now

        def synchronize(self):
            Event.now += 1.0

        def elapsed_time(self, later):
            assert later.at - self.at == 1.0
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = day.step_ratios.Scene("cuda", 0.0).clock()
    assert [clock() for _ in range(3)] == pytest.approx([0.001, 0.002, 0.003])


def test_shards_are_read_with_their_header_and_without(day, tmp_path):
    """A header read as tokens, or tokens cut off as one."""
    race, ids = day.race, np.arange(4000, dtype=np.uint16)
    header = np.zeros(256, dtype=np.int32)
    header[0] = race.MAGIC
    (tmp_path / "a_train.bin").write_bytes(header.tobytes() + ids.tobytes())
    (tmp_path / "b_train.bin").write_bytes(ids.tobytes())
    (tmp_path / "c_val.bin").write_bytes(ids[:100].tobytes())
    found, _ = race.text(tuple(sorted(tmp_path.iterdir())), 4000)
    assert np.array_equal(found.train, np.concatenate([ids, ids]))
    assert np.array_equal(found.validation, ids[:100])


def test_tokens_of_another_vocabulary_are_refused(day, tmp_path):
    np.arange(4000, dtype=np.uint16).tofile(tmp_path / "own.bin")
    with pytest.raises(day.UsageError, match="3999"):
        day.race.text((tmp_path / "own.bin",), 3999)
