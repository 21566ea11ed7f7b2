import dataclasses
import json
import math

import pytest
from rich.console import Console

pytest.importorskip("optuna")

from sophia import numerics
from sophia.lab import cli
from sophia.lab.config.protocol_parts import Search
from sophia.lab.config.run import Data
from sophia.lab.config.search_space import Choice, LogRange, at_edge
from sophia.lab.jobs import search, sweep
from sophia.lab.protocols import protocol_file
from sophia.lab.support.errors import Stopped, UsageError
from sophia.lab.training.run_folder import Record
from sophia.lab.training.workers import Events

SPACES = {
    "adamw": {"lr": LogRange(1e-4, 1e-1), "beta1": Choice((0.7, 0.8, 0.9))},
    "lion": {"lr": LogRange(1e-4, 1e-1), "warmup": Choice((0.05, 0.1, 0.2))},
}
RULE = Search(trials=7, spread=3, seed=5)
PROTOCOL = protocol_file.chosen("tiny", None).with_contenders(list(SPACES))


def trial(label, point):
    return PROTOCOL.trial(label, point, data=Data("own", "a" * 64, "b" * 64))


def loss(run):
    """A bowl around lr = 3e-3; diverges above 5e-2."""
    lr = run.optimizer.settings["lr"]
    return None if lr > 5e-2 else math.log(lr / 3e-3) ** 2


@pytest.fixture
def machine(monkeypatch):
    """Runs that take no time; ``left`` is after how many of them it is stopped."""
    state = {"left": math.inf, "done": [], "rounds": []}

    def execute(configs, runs, **options):
        left = [config for config in configs if Record(runs, config).result() is None]
        state["rounds"] += [[config.optimizer.contender for config in left]] if left else []
        for config in configs:
            if Record(runs, config).result() is not None:
                continue
            if state["left"] <= 0:
                raise Stopped("stopped", signal=15)
            state["left"] -= 1
            state["done"].append(config.hash)
            Record(runs, config).finish({"loss": loss(config)})

    monkeypatch.setattr(search, "execute", execute)
    return state


def do(folder):
    return search.search(SPACES, trial, RULE, folder, workers=1, events=Events())


def test_every_contender_has_the_same_number_of_trials_and_the_best_wins(machine, tmp_path):
    """Else the verdict would be about who was searched for longer."""
    trials = do(tmp_path)
    for label in SPACES:
        mine = [t for t in trials if t.contender == label]
        assert [t.number for t in mine] == list(range(RULE.trials))
        winner = search.best(trials, label)
        assert winner.loss == min(t.loss for t in mine if t.loss is not None)
        assert trial(label, winner.point).hash == winner.run
        for t in mine:
            assert set(t.point) == set(SPACES[label])
            assert 1e-4 <= t.point["lr"] <= 1e-1
            assert t.loss == loss(trial(label, t.point))
    lrs = sorted(t.point["lr"] for t in trials if t.contender == "adamw" and t.number < 3)
    assert lrs[0] < 1e-3 < lrs[1] < 1e-2 < lrs[2]  # one in each decade: spread evenly


@pytest.mark.parametrize("stops", [(1,), (4,), (6, 1), (7, 1, 1, 2)], ids=str)
def test_a_search_that_is_stopped_proposes_what_it_would_have_proposed(stops, machine, tmp_path):
    """Else a result would depend on when somebody pressed Ctrl-C, and runs would be repeated."""
    straight = do(tmp_path / "straight")
    machine["done"].clear()
    for count in stops:
        machine["left"] = count
        with pytest.raises(Stopped):
            do(tmp_path / "stopped")
    machine["left"] = math.inf
    assert do(tmp_path / "stopped") == straight
    assert len(machine["done"]) == len(set(machine["done"])) == len({t.run for t in straight})


@pytest.mark.parametrize("stop", [0, 4, 9])
def test_the_rounds_that_are_forecast_are_those_that_come(stop, machine, tmp_path):
    """Else the forecast of a sweep would count trials that are done, or let them run side by side."""
    machine["left"] = stop
    with pytest.raises(Stopped):
        do(tmp_path)
    machine["left"], machine["rounds"] = math.inf, []
    foreseen = search.rounds(SPACES, trial, RULE, tmp_path)
    do(tmp_path)
    assert foreseen == machine["rounds"]
    assert search.rounds(SPACES, trial, RULE, tmp_path) == []
    fresh = search.rounds(SPACES, trial, RULE, tmp_path / "fresh")
    assert fresh == [["adamw", "lion"] * 3, *[["adamw", "lion"]] * 4]


def test_points_of_a_space_and_seed_do_not_change(machine, tmp_path):
    """Else a sweep that another release began would go on with other points."""
    points = [t.point for t in do(tmp_path) if t.contender == "adamw"]
    assert points == POINTS


POINTS = [
    {"lr": 0.0241, "beta1": 0.7},
    {"lr": 0.000763, "beta1": 0.9},
    {"lr": 0.00429, "beta1": 0.8},
    {"lr": 0.000102, "beta1": 0.8},
    {"lr": 0.0807, "beta1": 0.9},
    {"lr": 0.00345, "beta1": 0.7},
    {"lr": 0.00259, "beta1": 0.7},
]


def test_the_runs_that_were_begun_are_known(machine, tmp_path):
    """Else a search would go on from trials of other code, and nobody would have looked."""
    assert search.begun_runs(SPACES, trial, tmp_path) == []
    machine["left"] = 4
    with pytest.raises(Stopped):
        do(tmp_path)
    begun = {run.hash for run in search.begun_runs(SPACES, trial, tmp_path)}
    assert set(machine["done"]) < begun
    assert len(begun) == 6, "the spread trials of both"


def test_a_sweep_of_other_numbers_does_not_go_on(text_file, tmp_path, monkeypatch):
    """Else trials that were told to the search under other numbers would choose today's settings."""

    class Written(Exception):
        pass

    def stop(*arguments, **more):
        raise Written

    monkeypatch.setattr(sweep, "search", stop)
    monkeypatch.setattr(sweep, "say_forecast", stop)
    protocol = dataclasses.replace(PROTOCOL, data=str(text_file)).with_contenders(["sophia-g"])
    arguments = {"out": tmp_path / "s", "console": Console(quiet=True)}
    for _ in range(2):  # its own numbers go on
        with pytest.raises(Written):
            sweep.sweep(protocol, **arguments)
    path = tmp_path / "s" / "sweep.json"
    content = json.loads(path.read_text())
    assert content.pop("numerics") == {"sophia-g": numerics.words(numerics.versions("gnb"))}
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="another sweep: it differs in numerics"):
        sweep.sweep(protocol, **arguments)


def test_if_all_diverge_nobody_wins():
    """Else settings that diverged would be handed on as tuned."""
    trials = [search.Trial("lion", i, {"lr": 0.1}, None, "x") for i in range(2)]
    assert search.best(trials, "lion") is None


EDGES = [
    ({"lr": 1e-2, "beta1": 0.8}, []),
    ({"lr": 9e-2, "beta1": 0.8}, ["lr"]),
    ({"lr": 1.1e-4, "beta1": 0.7}, ["lr", "beta1"]),
    ({"lr": 1e-2, "beta1": 0.9}, ["beta1"]),
]


@pytest.mark.parametrize(("point", "found"), EDGES)
def test_the_edge_of_a_space_is_flagged(point, found):
    """Else a reader would take the end of a range for an optimum."""
    assert at_edge(SPACES["adamw"], point) == found


def test_two_values_have_no_edge():
    """Else every choice between two would be flagged."""
    assert at_edge({"k": Choice((5, 10))}, {"k": 5}) == []


def test_a_sweep_writes_the_protocol_that_compare_takes_and_is_not_repeated(text_file, tmp_path, capsys):
    """Else the way from a search to a verdict would be by hand."""
    folder = tmp_path / "s"
    command = ["sweep", "lion", "--preset", "tiny", "--workers", "1", "--trials", "2"]
    command += ["--data", str(text_file), "--out", str(folder)]
    cli.main(command)
    out = " ".join(capsys.readouterr().out.split())
    assert "2 trials for each of adamw, lion" in out
    assert "tuned.toml" in out
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [(r["contender"], r["number"]) for r in rows] == [
        ("adamw", 0),
        ("adamw", 1),
        ("lion", 0),
        ("lion", 1),
    ]
    tuned = protocol_file.load(folder / "tuned.toml")
    for label in ("adamw", "lion"):
        winner = min((r for r in rows if r["contender"] == label), key=lambda r: r["loss"])["point"]
        assert tuned.contenders[label].warmup == winner.pop("warmup")
        assert tuned.contenders[label].settings == winner
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*")}
    cli.main(command)
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/*")}
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--trials", "3", "--resume"])
    assert end.value.code == 2
    assert "differs in search.trials" in capsys.readouterr().err


def test_without_optuna_the_message_names_the_extra(monkeypatch, capsys):
    """Else `sophia sweep` would end in an import error."""
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda n: None if n == "optuna" else find(n))
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep"])
    assert end.value.code == 1
    assert "torch-sophia[lab,sweep]" in capsys.readouterr().err
