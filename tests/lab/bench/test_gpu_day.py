"""The script that waits for a GPU, at toy size: what it holds must run when there is one for minutes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_day.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not in the source distribution")


@pytest.fixture(scope="module")
def gpu_day():
    spec = importlib.util.spec_from_file_location("gpu_day", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(out, *options):
    command = [sys.executable, str(SCRIPT), str(out), "--dry-run", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_all_parts_run_at_toy_size_and_are_not_done_again(gpu_day, tmp_path):
    """A name that has changed since, found when the machine is there."""
    out = tmp_path / "day.jsonl"
    done = run(out)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["part"]: row["found"] for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == list(gpu_day.PARTS)
    assert rows["correctness"]["passed"] > 0
    assert rows["step"]["rows"]["sophia"]["step"]["median"] > 0
    assert rows["graphs"]["compiled"]["apart"] < 1e-5
    trained = rows["pretraining"]["rows"]
    assert set(trained) == set(gpu_day.SETTINGS)
    assert len({row["held_out"][0][1] for row in trained.values()}) == 1  # the same start
    before = out.read_bytes()
    again = run(out)
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(gpu_day.PARTS)
    assert out.read_bytes() == before


def test_a_part_that_fails_is_a_line_and_is_tried_again(tmp_path):
    """Eight minutes that end at the first error, or an error that passes for a result."""
    out = tmp_path / "day.jsonl"
    for _ in range(2):
        done = run(out, "--only", "environment", "pretraining", "--tokens", str(tmp_path / "nowhere"))
        assert done.returncode == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["environment", "pretraining", "pretraining"]
    assert all("train.bin" in row["failed"] for row in rows[1:])


def test_a_test_of_a_path_that_fails_is_a_failure_of_the_part(gpu_day, tmp_path, monkeypatch):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_of_a_kernel():\n    assert False\n\n\ndef test_right():\n    pass\n")
    monkeypatch.setattr(gpu_day, "TESTS", (str(wrong),))
    with pytest.raises(RuntimeError, match="1 of 2 tests failed: test_of_a_kernel"):
        gpu_day.correctness(toy=True)


def test_as_many_steps_as_fit(gpu_day):
    """By a run of two steps and one of four: nine seconds around them, three a step."""
    assert gpu_day._that_fit(lambda name, steps: (None, 9 + 3 * steps), seconds=60) == 17
    assert gpu_day._that_fit(lambda name, steps: (None, 100.0), seconds=60) == 4
