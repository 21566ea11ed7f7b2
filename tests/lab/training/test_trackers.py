"""Trackers: a copy of the curves, whole and without doubles, however often a run was killed."""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sophia.lab import cli
from sophia.lab.support.errors import LabError, Stopped, UsageError
from sophia.lab.support.signals import Request
from sophia.lab.training import loop, trackers
from sophia.lab.training.run_folder import rows
from sophia.lab.training.trackers import Trackers, scalars
from sophia.lab.training.workers import Events, execute

OWN = """
import json


class Lines:
    def __init__(self, run):
        self.path = run.folder / f"{run.name}.lines"
        run.folder.mkdir(exist_ok=True)
        self.write(["made", run.id, run.group, run.config["optimizer"], run.resumed])

    def write(self, value):
        with self.path.open("a") as file:
            file.write(json.dumps(value) + chr(10))

    def log(self, step, numbers):
        self.write([step, dict(numbers)])

    def finish(self, result):
        self.write(["finished", None if result is None else result["status"]])


class Brittle(Lines):
    def log(self, step, numbers):
        if step >= 10:
            raise OSError("the network is gone")
        super().log(step, numbers)


class Closed(Lines):
    def __init__(self, run):
        raise ValueError("no key")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module ``own_tracker`` in the working folder, as a user has one; workers find it too."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "own_tracker.py").write_text(OWN)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_tracker:Lines"
    sys.modules.pop("own_tracker", None)


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved."""


def killed_at(step):
    def report(progress):
        if progress.step >= step:
            raise Killed

    return report


def stopped_at(step):
    request = Request()

    def report(progress):
        if progress.step >= step:
            request.signal = 15

    return {"stop": request, "report": report}


def lines(folder):
    (path,) = folder.glob("*.lines")
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(runs, config):
    """The rows of the finished log as a tracker should have had them."""
    found, before = [], None
    for row in rows(runs / config.hash):
        found.append((row["step"], scalars(row, before)))
        before = row if row["kind"] == "train" else before
    return found


def timeless(numbers):
    return {k: v for k, v in numbers.items() if "second" not in k and k != "optimizer/B"}


def test_a_tracker_of_ones_own_gets_everything_once(own, tiny, ids, tmp_path):
    """Else a user's tracker would have curves without names, or with holes."""
    config = tiny("sophia-g", steps=20)
    asked = Trackers((own,), group="g", folder=tmp_path / "t")
    result = loop.train(config, tmp_path / "runs", ids, trackers=asked)
    made, *logged, end = lines(tmp_path / "t")
    settings = {
        "contender": "sophia-g",
        "settings": dict(config.optimizer.settings),
        "numerics": config.optimizer.numerics,
    }
    assert made == ["made", config.hash, "g", settings, False]
    assert end == ["finished", result["status"]]
    assert [(step, numbers) for step, numbers in logged] == expected(tmp_path / "runs", config)
    names = {name for _, numbers in logged for name in numbers}
    assert {"train/loss", "validation/loss", "validation/bits_per_byte", "lr", "tokens_per_second"} <= names
    sophias = ("unclipped", "eps_limited", "h_q05", "h_q50", "h_q95", "refreshes", "age")
    assert {f"optimizer/{name}" for name in sophias} <= names
    last = [row for row in rows(tmp_path / "runs" / config.hash) if row["kind"] == "train"][-2:]
    pace = (last[1]["tokens"] - last[0]["tokens"]) / (last[1]["seconds"] - last[0]["seconds"])
    assert logged[-2][1]["tokens_per_second"] == pytest.approx(pace)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_run_that_goes_on_neither_doubles_nor_loses_a_point(how, own, tiny, ids, tmp_path):
    """Else curves would zigzag after every resume. A kill makes steps be done again, a stop does not."""
    config = tiny("sophia-g", steps=40)
    asked = Trackers((own,), folder=tmp_path / "t")
    runs = tmp_path / "runs"
    if how == "stopped":
        with pytest.raises(Stopped):
            loop.train(config, runs, ids, trackers=asked, **stopped_at(15))
    else:
        with pytest.raises(Killed):
            loop.train(config, runs, ids, save_every=10, trackers=asked, report=killed_at(25))
    loop.train(config, runs, ids, save_every=10, trackers=asked)
    seen = lines(tmp_path / "t")
    assert [value for value in seen if value[0] in ("made", "finished")] == [
        seen[0],
        ["finished", None],
        [*seen[0][:-1], True],
        ["finished", "finished"],
    ]
    logged = [(step, timeless(numbers)) for step, numbers in (v for v in seen if isinstance(v[0], int))]
    assert logged == [(step, timeless(numbers)) for step, numbers in expected(runs, config)]


def test_a_tracker_that_joins_late_gets_what_was_before(own, tiny, ids, tmp_path):
    """Else its curves would begin in the middle."""
    config = tiny(steps=20)
    runs = tmp_path / "runs"
    with pytest.raises(Stopped):
        loop.train(config, runs, ids, **stopped_at(10))
    loop.train(config, runs, ids, trackers=Trackers((own,), folder=tmp_path / "t"))
    logged = [(value[0], value[1]) for value in lines(tmp_path / "t") if isinstance(value[0], int)]
    assert logged == expected(runs, config)


def test_a_tracker_that_fails_costs_no_run(own, tiny, ids, tmp_path):
    """Else a broken network would end a week of training."""
    config = tiny(steps=20)
    asked = Trackers(("own_tracker:Brittle", own), folder=tmp_path / "t")
    with pytest.warns(trackers.TrackerFailed, match=r"Brittle failed \(OSError: the network is gone\)"):
        result = loop.train(config, tmp_path / "runs", ids, trackers=asked)
    assert result["status"] == "finished"
    steps = [value[0] for value in lines(tmp_path / "t") if isinstance(value[0], int)]
    assert steps[-1] == 20  # the other tracker had all of it


def test_a_tracker_that_cannot_be_opened_stops_the_run_before_its_first_step(own, tiny, ids, tmp_path):
    """Else somebody would find after a week that nothing was tracked."""
    config = tiny(steps=20)
    asked = Trackers((own, "own_tracker:Closed"), folder=tmp_path / "t")
    with pytest.raises(LabError, match=r"Closed could not be opened \(ValueError: no key\)"):
        loop.train(config, tmp_path / "runs", ids, trackers=asked)
    assert lines(tmp_path / "t")[-1] == ["finished", None]
    assert not list(rows(tmp_path / "runs" / config.hash))


def test_runs_in_workers_are_tracked_even_if_one_is_killed(own, tiny, ids, tmp_path):
    """Else only `sophia train` would have trackers, or a lost process would double its curve."""
    configs = [tiny("sophia-g", seed=seed, steps=40) for seed in (1, 2)]

    class Kill(Events):
        left = 1
        others = frozenset(multiprocessing.active_children())  # of tests of several ranks in this process

        def progress(self, run, step, loss, unclipped):
            if step >= 15 and self.left:
                self.left -= 1
                for child in set(multiprocessing.active_children()) - self.others:
                    os.kill(child.pid, signal.SIGKILL)

    execute(
        configs,
        tmp_path / "runs",
        workers=1,
        events=Kill(),
        save_every=10,
        trackers=Trackers((own,), folder=tmp_path / "t"),
    )
    for config in configs:
        path = tmp_path / "t" / f"sophia-g-40-seed{config.seed}-{config.hash[:6]}.lines"
        seen = [json.loads(line) for line in path.read_text().splitlines()]
        logged = [(v[0], sorted(v[1])) for v in seen if isinstance(v[0], int)]
        wanted = [(step, sorted(numbers)) for step, numbers in expected(tmp_path / "runs", config)]
        # At worst the kill fell between a row's mark and the row; it never doubles one.
        assert [pair for pair in wanted if pair in logged] == logged
        assert len(wanted) - len(logged) <= (config.seed == 1)


# Reading back what the real packages wrote: (tag -> [(step, value)], name, configuration).


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (text,) = events.Tensors("config/text_summary")
    return curves, run.name, json.loads(text.tensor_proto.string_val[0])


def wandb_records(path):
    """The records of a W&B file: blocks of 32 KiB; a piece is checksum, length, kind (1 is a whole record, 2
    the first piece of one, 3 a middle, 4 the last), data. The first block begins with seven bytes of its own.
    """
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(folder):
    from wandb.proto import wandb_internal_pb2 as protocol

    def records(path):
        return [protocol.Record.FromString(data) for data in wandb_records(path)]

    curves, name, config = {}, None, {}
    deadline = time.monotonic() + 60
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        # A process of its own writes the file, and ends a little after the run.
        while not any(r.HasField("exit") for r in records(path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                for key, value in row.items():
                    if not key.startswith("_"):
                        curves.setdefault(key, []).append((row["_step"], value))
    return curves, name, config


def read_trackio(folder):
    import sqlite3

    with sqlite3.connect(folder / "trackio" / "sophia.db") as database:
        found = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
    curves = {}
    for _, step, metrics in found:
        for key, value in json.loads(metrics).items():
            curves.setdefault(key, []).append((step, value))
    return curves, found[0][0], json.loads(config)


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("host", READERS)
def test_the_real_packages_hold_the_curves_of_a_run_that_was_killed_and_went_on(
    host, tiny, ids, tmp_path, monkeypatch
):
    """Else a tracker would be said to work and show half a run, a run twice, or one without a name."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "t" / "trackio"))  # read when it is imported
    pytest.importorskip(host)
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    config = tiny("sophia-g", steps=40)
    asked = Trackers((host,), group="g", folder=tmp_path / "t")
    asked.check()
    runs = tmp_path / "runs"
    with pytest.raises(Killed):
        loop.train(config, runs, ids, save_every=10, trackers=asked, report=killed_at(25))
    loop.train(config, runs, ids, save_every=10, trackers=asked)
    curves, name, settings = READERS[host](tmp_path / "t")
    assert name == f"sophia-g-40-seed1-{config.hash[:6]}"
    assert settings["optimizer"]["settings"]["lr"] == config.optimizer.settings["lr"]
    wanted = {}
    for step, numbers in expected(runs, config):
        for key, value in numbers.items():
            wanted.setdefault(key, []).append((step, value))
    assert set(wanted) <= set(curves)
    for key, points in wanted.items():
        assert [step for step, _ in curves[key]] == [step for step, _ in points], key
        if timeless({key: 0}):
            values = [value for _, value in points]
            assert [value for _, value in curves[key]] == pytest.approx(values, rel=1e-6), key


def test_wandb_is_offline_unless_the_environment_says_otherwise(tiny, ids, tmp_path, monkeypatch):
    """Else a run would need an account, or talk to a network unasked; or could never be sent."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    offline = Trackers(("wandb",), folder=tmp_path / "a")
    loop.train(tiny(steps=5), tmp_path / "runs-a", ids, trackers=offline)
    assert list((tmp_path / "a").glob("wandb/offline-run-*"))
    assert "wandb sync" in offline.words()[0]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    disabled = Trackers(("wandb",), folder=tmp_path / "b")
    loop.train(tiny(steps=5), tmp_path / "runs-b", ids, trackers=disabled)
    assert not list((tmp_path / "b").glob("wandb/*run-*"))
    assert disabled.words() == ("W&B, disabled",)


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
@pytest.mark.parametrize("name", trackers.NAMES)
def test_a_missing_package_is_named_before_anything_runs(
    name, command, text_file, tmp_path, monkeypatch, capsys
):
    """Else the error would come from a worker, after minutes, or leave a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # as wandb leaves one: a folder of that name is not the package
    find = importlib.util.find_spec
    empty = importlib.machinery.ModuleSpec(name, None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: empty if n == name else find(n, *a))
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--preset", "tiny", "--data", str(text_file), "--tracker", name])
    assert end.value.code == 1
    assert f"pip install 'torch-sophia[lab,{name}]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlflow", "no tracker 'mlflow'"),
        ("nowhere:Tracker", "cannot be imported"),
        ("json:Tracker", "has no"),
    ],
)
def test_a_name_of_nothing_is_refused(name, message):
    """Else a misspelt tracker would be silence."""
    with pytest.raises(UsageError, match=message):
        Trackers((name,)).check()


def test_without_a_tracker_none_is_imported_and_nothing_is_left(text_file, tmp_path):
    """Else every run would pay for packages that nobody asked for."""
    script = (
        "import sys; from sophia.lab import cli;"
        f"cli.main(['train', '--preset', 'tiny', '--steps', '5', '--data', {str(text_file)!r}]);"
        "seen = ('tensorboard', 'wandb', 'trackio', 'sophia.lab.training.tracker_hosts');"
        "print([m for m in seen if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert out.splitlines()[-1] == "[]"
    assert not list(tmp_path.rglob("*.sent"))


def test_a_comparison_and_a_sweep_give_their_runs_to_the_tracker(own, text_file, tmp_path, capsys):
    """Else the option would be there and reach no worker."""
    common = ["--preset", "tiny", "--data", str(text_file), "--workers", "1", "--tracker", own]
    cli.main(["compare", *common, "--seeds", "1", "--budgets", "10", "--out", str(tmp_path / "c")])
    assert len(list((tmp_path / "c").glob("*.lines"))) == 2
    (made,) = {json.loads(p.read_text().splitlines()[0])[2] for p in (tmp_path / "c").glob("*.lines")}
    assert made == "c"
    pytest.importorskip("optuna")
    cli.main(["sweep", *common, "--trials", "1", "--out", str(tmp_path / "s")])
    assert {path.name.split("-20-")[0] for path in (tmp_path / "s").glob("*.lines")} == {"adamw", "sophia-g"}
    assert Path("own_tracker.py").exists()
    capsys.readouterr()
