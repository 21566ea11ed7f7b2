"""The forecast of a command: arithmetic, words, and that it writes nothing."""

import dataclasses
import json

import pytest

from sophia.lab import cli
from sophia.lab.forecast import comparison
from sophia.lab.forecast.comparison import Remaining
from sophia.lab.training.pace import Pace

PACE = Pace(step=0.1, evaluation=0.5, around=2.0, state=1_000_000)


def test_every_worker_is_busy_while_a_pace_is_measured(tiny):
    """Else a contender would be measured alone on a machine that it will share."""
    runs = [tiny(name, seed=seed) for seed in (1, 2) for name in ("adamw", "lion", "sophia-g")]
    names = [run.optimizer.contender for run in comparison.probes(runs, 2)]
    assert names == ["adamw", "lion", "sophia-g", "adamw"]
    assert len(comparison.probes(runs[:1], 4)) == 4
    assert comparison.probes([], 2) == []


def test_what_failed_in_one_worker_and_not_in_the_other_is_known(tiny):
    """Else one worker without memory would hide a pace that was measured."""
    a, b = tiny("adamw"), tiny("lion")
    slow = dataclasses.replace(PACE, step=0.3)
    found = comparison.paces([(a, PACE), (a, slow), (b, "it died"), (b, PACE), (tiny("sgd"), "it died")])
    assert found["adamw"].step == pytest.approx(0.2)
    assert found["lion"] == PACE
    assert found["sgd"] == "it died"


@pytest.fixture
def ahead(tiny, tmp_path, monkeypatch):
    """``ahead(lefts, paces)``: the forecast of runs of 100 steps, on a disk with 5 MB free."""
    monkeypatch.setattr(comparison.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5_000_000}))
    monkeypatch.setattr(comparison.os, "getloadavg", lambda: (0.5, 0.5, 0.5))

    def make(lefts, paces, runs=4, rounds=None, **how):
        return comparison.forecast(
            rounds or [lefts],
            paces,
            records=tmp_path / "runs",
            runs=runs,
            report=False,
            **{"workers": 1, **how},
        )

    return make


def test_the_sentence_says_time_pace_and_disk(ahead, tiny):
    """Else a number would stand there without what it is made of."""
    runs = [tiny(name, steps=100, seed=s) for s in (1, 2) for name in ("adamw", "sophia-g")]
    seconds = Remaining(runs[0], 0).seconds(PACE)
    assert seconds == pytest.approx(2 + 100 * 0.1 + 3 * 0.5)
    slower = dataclasses.replace(PACE, step=0.12)
    found = ahead([Remaining(run, 0) for run in runs], {"adamw": PACE, "sophia-g": slower})
    assert found.seconds == pytest.approx(4 * seconds + 2 * 100 * 0.02)
    assert found.sentence == (
        "Forecast: about 58 s. Measured in 11 steps of each: a step takes 100 ms with adamw, 120 ms with "
        "sophia-g; an evaluation 500 ms. Disk: about 75 kB, 5.0 MB are free."
    )


def test_what_was_done_before_is_said_and_not_counted(ahead, tiny):
    """Else a resumed command would promise the time of all of it, or hide that it goes on."""
    left = [Remaining(tiny(steps=100, seed=1), 50, begun=True), Remaining(tiny(steps=100, seed=2), 0)]
    found = ahead(left, {"adamw": PACE})
    assert found.seconds == pytest.approx(2 + 5 + 0.5 + Remaining(left[1].run, 0).seconds(PACE))
    start = "Forecast: 2 of 4 runs have ended before, 1 goes on; about 21 s for the rest. "
    assert found.sentence.startswith(start)
    assert "1 of 4 runs has ended before; about" in ahead(left[1:] * 3, {"adamw": PACE}).sentence


def test_a_disk_that_is_too_small_and_a_contender_that_was_not_measured_are_named(ahead, tiny):
    """Else the night would end on a full disk, or a sum would silently lack a contender."""
    runs = [Remaining(tiny(name, steps=300), 0) for name in ("adamw", "lion")]
    found = ahead(
        runs, {"adamw": dataclasses.replace(PACE, state=9_000_000), "lion": "its process died"}, runs=2
    )
    assert "about 18 MB, 5.0 MB are free. That is more than there is." in found.sentence
    assert ", without lion. " in found.sentence
    assert found.sentence.endswith("Not measured: lion, its process died")
    nothing = ahead(runs[1:], {"lion": "its process died"}, runs=1).sentence
    assert nothing == "No forecast of the time. Not measured: lion, its process died"


def test_a_busy_machine_is_said(ahead, tiny, monkeypatch):
    """Else a pace that others have slowed would be read as that of the machine."""
    left = [Remaining(tiny(steps=100), 0)]
    assert "busy" not in ahead(left, {"adamw": PACE}).sentence
    monkeypatch.setattr(comparison.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(comparison.os, "getloadavg", lambda: (6.1, 0.0, 0.0))
    assert "The machine is busy (load 6.1)" in ahead(left, {"adamw": PACE}).sentence
    monkeypatch.setattr(comparison.os, "getloadavg", lambda: (5.9, 9.0, 9.0))
    assert "busy" not in ahead(left, {"adamw": PACE}).sentence


def test_workers_share_the_runs_of_a_round_and_rounds_wait(ahead, tiny):
    """Else two workers would halve what one long run takes, or a sweep, whose proposals wait for results,
    would be promised as if they did not.
    """
    one, long = Remaining(tiny(steps=100), 0), Remaining(tiny(steps=1000), 0)
    alone, whole = one.seconds(PACE), long.seconds(PACE)
    for rounds, workers, seconds in (
        ([], 2, 0.0),
        ([[one, one], [one]], 1, 3 * alone),
        ([[one, one, one, one]], 2, 2 * alone),
        ([[one], [one]], 2, 2 * alone),
        ([[long, one]], 2, whole),  # nobody helps with the long one
    ):
        found = ahead([], {"adamw": PACE}, rounds=rounds or [[]], workers=workers)
        assert found.seconds == pytest.approx(seconds)


COMMANDS = {
    "compare": ["--seeds", "1", "--budgets", "10", "--workers", "1"],
    "sweep": ["lion", "--trials", "2", "--workers", "1"],
    "train": ["--steps", "10"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_forecast_alone_writes_nothing(command, text_file, tmp_path, monkeypatch, capsys):
    """Else asking for the price would block the folder, or begin the work."""
    if command == "sweep":
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    arguments = [command, "--preset", "tiny", "--data", str(text_file), *COMMANDS[command], "--forecast"]
    cli.main(arguments)
    out = " ".join(capsys.readouterr().out.split())
    assert "Forecast: about" in out
    assert "a step takes" in out
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_goes_on_counts_the_rest(text_file, tmp_path, capsys):
    """Else the forecast of a resumed comparison would be that of a new one."""
    out = tmp_path / "c"
    arguments = ["compare", "--preset", "tiny", "--data", str(text_file), "--seeds", "1", "--budgets", "10"]
    arguments += ["--workers", "1", "--out", str(out)]
    cli.main(arguments)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Forecast: about") == 1
    assert said.index("Forecast") < said.index("adamw, 10 steps, seed 1: loss")
    plan = json.loads((out / "comparison.json").read_text())
    (out / "runs" / plan["runs"][0]["run"] / "result.json").unlink()
    cli.main([*arguments, "--resume"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Forecast: 1 of 2 runs has ended before; about" in said
    assert "with adamw" in said
    assert "with sophia-g" not in said  # nothing is left of it, so it is not measured
