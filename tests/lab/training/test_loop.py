import dataclasses
import json
import multiprocessing
import subprocess
import sys
import warnings

import pytest
import torch

from needs import names_of
from sophia.lab.optimizers import table
from sophia.lab.support.dataclass_json import to_json
from sophia.lab.support.errors import LabError, Stopped
from sophia.lab.support.files import locked
from sophia.lab.support.signals import Request
from sophia.lab.training import checkpoint, loop
from sophia.lab.training.checkpoint import DamagedCheckpoint
from sophia.lab.training.fingerprint import fingerprint
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import Record, rows

# B is the count of the last refresh of this process; after a resume it is known again with the next one.
# The environment names the commit, and a checkout may move on while a test runs.
TIMES = {"seconds", "cpu_seconds", "B", "environment"}


def timeless(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def log(runs, config):
    return [timeless(row) for row in rows(runs / config.hash)]


def stop_at(step):
    """A request to stop, and a report that makes it once the step is reached."""
    request = Request()

    def report(progress):
        if progress.step >= step:
            request.signal = 15

    return {"stop": request, "report": report}


def leaves(value):
    """All tensors and numbers of a nested state, in order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def assert_same_state(one, two):
    for a, b in zip(leaves(one), leaves(two), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_loss_falls_and_the_records_are_complete(tiny, ids, tmp_path):
    """Else a comparison would have nothing to compare."""
    config = tiny("sophia-g", steps=60, over={"lr": 3e-3})
    result = train(config, tmp_path, ids)
    assert result["status"] == "finished"
    assert result["steps"] == 60
    assert result["tokens"] == 60 * 4 * 32
    assert result["gradient_evaluations"] == pytest.approx(63)
    assert result["flops"] == pytest.approx(6 * result["parameters"] * result["tokens"] * 1.05)
    assert result["unclipped"] is not None
    assert {"torch", "python", "processor", "threads", "sophia", "commit"} <= set(result["environment"])
    evaluations = [r for r in rows(tmp_path / config.hash) if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 30, 60]
    assert evaluations[-1]["loss"] == result["loss"] < evaluations[0]["loss"] - 0.5
    trained = [r for r in rows(tmp_path / config.hash) if r["kind"] == "train"]
    assert [r["step"] for r in trained] == list(range(5, 61, 5))
    assert {"loss", "lr", "grad_norm", "tokens", "gradient_evaluations", "unclipped"} <= set(trained[0])
    assert json.loads((tmp_path / config.hash / "result.json").read_text()) == result


def test_a_rule_without_curvature_says_nothing_of_it(tiny, ids, tmp_path):
    """A table that says 0.0% unclipped of a step that clips nothing."""
    config = tiny("sophia-spectral", steps=5)
    result = train(config, tmp_path, ids)
    assert result["unclipped"] is None
    (row,) = (r for r in rows(tmp_path / config.hash) if r["kind"] == "train")
    assert not {"unclipped", "eps_limited", "h_zero", "h_q50"} & set(row)
    assert row["has_curvature"] == 0


def test_the_share_of_clipped_gradients_is_counted_at_every_step(tiny, ids, tmp_path):
    """Else the experiment on stability would rest on every fifth step, or lose what was before a stop."""
    config = tiny(steps=20, clip=1.5)
    every = train(dataclasses.replace(config, log_every=1), tmp_path, ids)
    logged = [
        r for r in rows(tmp_path / dataclasses.replace(config, log_every=1).hash) if r["kind"] == "train"
    ]
    share = sum(r["grad_norm"] > 1.5 for r in logged) / 20
    assert 0 < share < 1
    assert every["gradient_clipped"] == pytest.approx(share)
    assert [r["gradient_clipped"] for r in logged] == [float(r["grad_norm"] > 1.5) for r in logged]
    with pytest.raises(Stopped):
        train(config, tmp_path, ids, **stop_at(7))
    assert train(config, tmp_path, ids)["gradient_clipped"] == pytest.approx(share)


def test_two_equal_runs_are_equal_bit_for_bit(tiny, ids, tmp_path):
    """Else nobody could repeat a result."""
    config = tiny("sophia-g")
    results = [train(config, tmp_path / name, ids) for name in "ab"]
    assert results[0]["loss"] == results[1]["loss"]
    assert log(tmp_path / "a", config) == log(tmp_path / "b", config)


def test_the_caller_may_use_the_global_random_state(tiny, ids, tmp_path):
    """Else what ran before in the same process would change a run."""
    config = tiny("sophia-g")
    torch.manual_seed(99)
    one = train(config, tmp_path / "a", ids)
    torch.manual_seed(100)
    assert train(config, tmp_path / "b", ids)["loss"] == one["loss"]


@pytest.mark.parametrize("contender", names_of(["adamw", "sophia-g", "sophia-h", "muon"]))
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(contender, tiny, ids, tmp_path, monkeypatch):
    """Else a stop would change the result: weights, optimizer state or log, wherever it was cut."""
    config = tiny(contender, log_every=1)
    fingerprint(table.find(contender))  # once a process: its optimizer is none of those that are compared
    finals = {}
    build = table.find(contender).build

    def remembering(name):
        row = table.find(contender)

        def make(model, settings, seed):
            finals[name] = (model, build(model, settings, seed))
            return finals[name][1]

        return {contender: row.__class__(**{**vars(row), "build": make})}

    monkeypatch.setattr(table, "CONTENDERS", remembering("straight"))
    straight = train(config, tmp_path / "straight", ids)
    for cut in ((1,), (11,), (7, 20)):
        name = f"cut at {cut}"
        monkeypatch.setattr(table, "CONTENDERS", remembering(name))
        for step in cut:
            with pytest.raises(Stopped, match=f"step {step} of 24"):
                train(config, tmp_path / name, ids, **stop_at(step))
        resumed = train(config, tmp_path / name, ids)
        assert timeless(resumed) == timeless(straight)
        assert log(tmp_path / name, config) == log(tmp_path / "straight", config)
        for one, two in zip(finals["straight"], finals[name], strict=True):
            assert_same_state(one.state_dict(), two.state_dict())
        attempts = (tmp_path / name / config.hash / "attempts.jsonl").read_text().splitlines()
        assert [json.loads(a)["from_step"] for a in attempts] == [0, *cut]


def test_a_stop_between_two_rows_of_the_log_loses_nothing(tiny, ids, tmp_path):
    """Else the mean loss of the interval in which the stop fell would be of a part of it."""
    config = tiny(steps=20, log_every=10)
    straight = train(config, tmp_path / "a", ids)
    request = Request()
    batch = type(ids).batch

    class Counting(type(ids)):
        def batch(self, *, step, **rest):
            if step == 13:
                request.signal = 2
            return batch(self, step=step, **rest)

    with pytest.raises(Stopped) as stopped:
        train(config, tmp_path / "b", Counting(ids.train, ids.validation), stop=request)
    assert stopped.value.code == 130
    assert timeless(train(config, tmp_path / "b", ids)) == timeless(straight)
    assert log(tmp_path / "a", config) == log(tmp_path / "b", config)


KILLED = """
import json, os, pathlib, signal, sys
from sophia.lab.config.run import Run
from sophia.lab.support.dataclass_json import from_json
from sophia.lab.data.tokens import open_cached
from sophia.lab.training.loop import train
config = from_json(Run, json.loads(sys.argv[1]))
def report(progress):
    if progress.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
train(config, pathlib.Path(sys.argv[2]), open_cached(config.data.text), save_every=4, report=report)
"""


def test_kill_9_loses_at_most_one_interval_and_nothing_of_the_result(tiny, ids, tmp_path):
    """Else a crash of the machine would cost the run, or leave gaps or repeats in its log."""
    config = tiny("sophia-g", log_every=1)
    straight = train(config, tmp_path / "straight", ids)
    for step in (2, 10):
        argv = [
            sys.executable,
            "-c",
            KILLED,
            json.dumps(to_json(config)),
            str(tmp_path / "killed"),
            str(step),
        ]
        assert subprocess.run(argv, check=False).returncode == -9
    state = checkpoint.load(tmp_path / "killed" / config.hash)
    assert state is not None
    assert state["step"] == 8
    assert timeless(train(config, tmp_path / "killed", ids)) == timeless(straight)
    assert log(tmp_path / "killed", config) == log(tmp_path / "straight", config)


def test_a_damaged_checkpoint_still_ends_bit_for_bit(tiny, ids, tmp_path):
    """Else falling back would end elsewhere."""
    config = tiny(log_every=1)
    straight = train(config, tmp_path / "straight", ids)
    with pytest.raises(Stopped):
        train(config, tmp_path / "torn", ids, save_every=5, **stop_at(12))
    newest = tmp_path / "torn" / config.hash / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(DamagedCheckpoint, match="10 steps into the run"):
        assert timeless(train(config, tmp_path / "torn", ids)) == timeless(straight)
    assert log(tmp_path / "torn", config) == log(tmp_path / "straight", config)


def test_micro_batches_change_the_rounding_alone(tiny, ids, tmp_path):
    """Else a model too large for one batch would be another experiment."""
    whole = train(tiny(), tmp_path, ids)
    parts = train(tiny(micro_batches=4), tmp_path, ids)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_a_run_that_diverges_says_when_and_keeps_its_last_good_state(tiny, ids, tmp_path, monkeypatch):
    """Else NaN would be trained on for hours, and saved over the last good state."""
    monkeypatch.setattr(
        loop.schedules, "factor", lambda schedule, step, steps: float("inf") if step == 13 else 1.0
    )
    config = tiny(log_every=1)
    result = train(config, tmp_path, ids, save_every=5)
    assert result["status"] == "diverged"
    assert result["steps"] == 14
    assert result["loss"] is None
    state = checkpoint.load(tmp_path / config.hash)
    assert state is not None
    assert state["step"] == 10
    assert all(bool(torch.isfinite(t).all()) for t in state["model"].values())
    assert train(config, tmp_path, ids) == result  # it is not tried again


def test_a_finished_run_is_not_run_again(tiny, ids, tmp_path):
    """Else restarting a comparison would repeat what is done."""
    config = tiny()
    first = train(config, tmp_path, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(config, tmp_path, None, report=lambda p: pytest.fail("it ran")) == first


def test_a_second_writer_is_refused(tiny, ids, tmp_path):
    """Else two processes would mix their rows in one log."""
    config = tiny()
    with locked(tmp_path / config.hash, what="run"), pytest.raises(LabError, match="Another process"):
        train(config, tmp_path, ids)


def hold(folder, ready):
    with locked(folder, what="run"):
        ready.set()
        import time

        time.sleep(60)


def test_the_lock_dies_with_its_process(tmp_path):
    """Else a killed run could not be resumed without deleting a file by hand."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(LabError, match="Another process"), locked(tmp_path, what="run"):
        pass
    process.kill()
    process.join()
    with locked(tmp_path, what="run"):
        pass


def test_a_folder_of_another_configuration_is_refused(tiny, ids, tmp_path):
    """Else records edited by hand would pass as the run's own."""
    config = tiny()
    record = Record(tmp_path, config)
    record.open()
    changed = {**to_json(config), "steps": 25, "clip": 2.0}
    (record.folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(LabError, match="other values of steps, clip"):
        train(config, tmp_path, ids)


def test_a_log_that_lost_rows_is_refused(tiny, ids, tmp_path):
    """Else a gap would look like a fast run."""
    config = tiny(log_every=1)
    with pytest.raises(Stopped):
        train(config, tmp_path, ids, **stop_at(9))
    (tmp_path / config.hash / "log.jsonl").write_text("")
    with pytest.raises(LabError, match="shorter than at its checkpoint"):
        train(config, tmp_path, ids)


def test_a_clock_that_is_set_back_changes_nothing(tiny, ids, tmp_path, monkeypatch):
    """Else seconds could be negative after a correction of the clock."""
    monkeypatch.setattr("time.time", lambda: -1e9)
    result = train(tiny(), tmp_path, ids)
    assert result["seconds"] > 0
    assert result["cpu_seconds"] > 0


def test_without_a_gpu_a_run_for_one_is_refused(tiny, ids, tmp_path, monkeypatch):
    """Else it would end in a traceback of torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LabError, match="for a GPU"):
        train(tiny(device="cuda"), tmp_path, ids)


def test_no_optimizer_is_named_in_the_loop():
    """Else a contender could get special treatment."""
    import inspect

    source = inspect.getsource(loop).lower()
    assert not [name for name in ("adamw", "lion", "muon", "signum", "sophia-", "hessian") if name in source]
