"""Budgets that share their stable phase: the same numbers as apart, for fewer steps."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from sophia.lab.config.run import Schedule
from sophia.lab.support.dataclass_json import to_json
from sophia.lab.support.errors import Stopped, UsageError
from sophia.lab.support.signals import Request
from sophia.lab.training import checkpoint, shared_start
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import Record, rows
from sophia.lab.training.workers import Events, execute

TIMES = {"seconds", "cpu_seconds", "environment", "trunk", "B"}
BUDGETS = (16, 24, 40)


def timeless(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def log(folder):
    return [timeless(row) for row in rows(folder)]


@pytest.fixture(scope="module")
def family(tiny):
    """``family(contender)``: its runs, the shortest first; they decay from steps 12, 18 and 30 on."""

    def make(contender="adamw", seed=1, budgets=BUDGETS):
        schedule = Schedule(kind="wsd", warmup=4, decay=0.25)
        one = tiny(contender, schedule=schedule, seed=seed, log_every=4)
        return [dataclasses.replace(one, steps=steps) for steps in budgets]

    return make


@pytest.fixture(scope="module")
def alone(family, ids, tmp_path_factory):
    """The folder in which each run was trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for contender in ("adamw", "sophia-g"):
        for config in family(contender):
            train(config, folder, ids)
    return folder


def assert_as_alone(config, folder, alone):
    assert timeless(Record(folder, config).result()) == timeless(Record(alone, config).result())
    assert log(folder / config.hash) == log(alone / config.hash)


class Heard(Events):
    """Which steps each run has reported, and in which order runs ended."""

    def __init__(self):
        self.steps, self.ends = {}, []

    def progress(self, run, step, loss, unclipped):
        self.steps.setdefault(run.hash, []).append(step)

    def ended(self, run, result):
        self.ends.append(run.steps)


@pytest.mark.parametrize(("contender", "workers"), [("adamw", 2), ("sophia-g", 1)])
def test_shared_budgets_are_those_trained_alone_bit_for_bit(contender, workers, family, alone, ids, tmp_path):
    """Else sharing would change results, or save nothing."""
    configs, heard = family(contender), Heard()
    execute(configs[::-1], tmp_path, workers=workers, events=heard)
    for config, first in zip(configs, (16, 20, 4), strict=True):  # the first row after 12, 18 and 0 steps
        assert_as_alone(config, tmp_path, alone)
        assert heard.steps[config.hash][0] == first
    assert [json.loads((tmp_path / c.hash / "attempts.jsonl").read_text())["from_step"] for c in configs] == [
        12,
        18,
        0,
    ]


def test_what_is_shared_is_in_the_record_and_the_rest_is_the_cost_alone(family, alone, ids, tmp_path):
    """Else a sum over runs would count the trunk three times, or a budget would look cheaper than it is."""
    short, middle, trunk = family()
    execute([short, middle, trunk], tmp_path, workers=1, events=Events())
    results = {c.steps: Record(tmp_path, c).result() for c in (short, middle, trunk)}
    assert "trunk" not in results[40]
    for config, at in ((short, 12), (middle, 18)):
        result = results[config.steps]
        assert (result["trunk"]["run"], result["trunk"]["steps"]) == (trunk.hash, at)
        assert result["steps"] == result["gradient_evaluations"] == config.steps
        assert result["tokens"] == config.steps * config.tokens_per_step
        assert 0 < result["trunk"]["seconds"] < result["seconds"]
        assert 0 < result["trunk"]["cpu_seconds"] < result["cpu_seconds"]
    assert results[24]["trunk"]["seconds"] < results[40]["seconds"]
    assert shared_start.steps_to_do([short, middle, trunk]) == 40 + (16 - 12) + (24 - 18)


KILLED = """
import json, os, pathlib, signal, sys
from sophia.lab.config import Run
from sophia.lab.strict import from_json
from sophia.lab.tokens import open_cached
from sophia.lab.training import train
from sophia.lab.trunks import Branch
config, *others = [from_json(Run, c) for c in json.loads(sys.argv[1])]
branches = [Branch(run, at) for run, at in zip(others, (12, 18))]
def report(progress):
    if progress.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
train(config, pathlib.Path(sys.argv[2]), open_cached(config.data.text), save_every=8, report=report,
      branches=branches)
"""


@pytest.mark.parametrize("at", [12, 16])
def test_a_trunk_that_is_killed_plants_what_it_has_not_planted(at, family, alone, ids, tmp_path):
    """Else a crash near a fork would lose a branch, or do it from another state."""
    short, middle, trunk = family("sophia-g")
    plans = json.dumps([to_json(c) for c in (trunk, short, middle)])
    argv = [sys.executable, "-c", KILLED, plans, str(tmp_path), str(at)]
    assert subprocess.run(argv, check=False).returncode == -9
    assert shared_start.planted(tmp_path, short) == (
        at > 12
    )  # the row is reported before the branch is planted
    assert shared_start.planted(tmp_path, middle) == (at > 18)
    execute([trunk, middle, short], tmp_path, workers=1, events=Events())
    for config in (short, middle, trunk):
        assert_as_alone(config, tmp_path, alone)
        assert config is trunk or Record(tmp_path, config).result()["trunk"]["run"] == trunk.hash


def test_a_branch_that_is_stopped_goes_on_and_keeps_what_it_shared(family, alone, ids, tmp_path):
    """Else its costs would be counted twice after a stop."""
    short, middle, trunk = family("sophia-g")
    train(trunk, tmp_path, ids, branches=shared_start.branches([short, middle, trunk])[trunk.hash])
    request = Request()

    def report(progress):
        request.signal = 15 if progress.step == 20 else None

    with pytest.raises(Stopped, match="step 20 of 24"):
        train(middle, tmp_path, ids, stop=request, report=report)
    train(middle, tmp_path, ids)
    assert_as_alone(middle, tmp_path, alone)
    assert Record(tmp_path, middle).result()["trunk"]["steps"] == 18


def test_a_branch_that_was_begun_by_itself_is_left_alone(family, alone, ids, tmp_path):
    """Else a run further on would be thrown back, or a finished one opened again."""
    short, middle, trunk = family()
    train(short, tmp_path, ids)
    request = Request()
    request.signal = 15
    with pytest.raises(Stopped):
        train(middle, tmp_path, ids, stop=request)
    before = (tmp_path / short.hash / "log.jsonl").read_bytes()
    execute([trunk, middle, short], tmp_path, workers=1, events=Events())
    assert (tmp_path / short.hash / "log.jsonl").read_bytes() == before
    for config in (short, middle, trunk):
        assert_as_alone(config, tmp_path, alone)
        assert "trunk" not in Record(tmp_path, config).result()


def test_without_its_trunk_a_branch_runs_by_itself(family, alone, ids, tmp_path, monkeypatch):
    """Else a trunk that failed or was done before would block the shorter budgets for ever."""
    short, _, trunk = family()
    train(trunk, tmp_path, ids)  # before anybody thought of the shorter one
    execute([trunk, short], tmp_path, workers=1, events=Events())
    assert_as_alone(short, tmp_path, alone)


def test_only_runs_that_differ_in_their_steps_alone_share(family, tiny):
    """Else a branch would have started from another seed's weights, or under another schedule."""
    short, middle, trunk = family()
    found = shared_start.branches([*family("lion"), short, trunk, *family(seed=2), middle])
    assert {len(group) for group in found.values()} == {2}
    assert [(b.run, b.at) for b in found[trunk.hash]] == [(short, 12), (middle, 18)]
    other = dataclasses.replace(short, schedule=dataclasses.replace(short.schedule, warmup=3))
    assert shared_start.branches([other, trunk]) == {}
    assert shared_start.branches([tiny(steps=20), tiny(steps=40)]) == {}, "a cosine has no trunk"
    whole = [
        dataclasses.replace(c, schedule=Schedule(kind="wsd", warmup=0, decay=1.0)) for c in (short, trunk)
    ]
    assert shared_start.branches(whole) == {}, "a schedule that decays from the start has no trunk"


def test_a_team_cannot_plant(family, ids, tmp_path):
    """Else every process would write the same branch."""

    class Two:
        rank, size = 0, 2

    short, _, trunk = family()
    with pytest.raises(UsageError, match="Train each budget by itself"):
        train(trunk, tmp_path, ids, team=Two(), branches=[shared_start.Branch(short, 12)])


def test_a_planted_state_is_the_one_at_the_fork(family, ids, tmp_path):
    """Else the branch would begin with a trunk that had already decayed."""
    short, middle, trunk = family()
    train(trunk, tmp_path, ids, branches=shared_start.branches([short, middle, trunk])[trunk.hash])
    for config, at in ((short, 12), (middle, 18)):
        state = checkpoint.load(tmp_path / config.hash)
        assert state["step"] == at
        assert {group["lr"] for group in state["optimizer"]["param_groups"]} == {
            config.optimizer.settings["lr"]
        }
        assert all(bool(torch.isfinite(t).all()) for t in state["model"].values())
