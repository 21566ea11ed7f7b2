"""What a step takes, held to runs on a clock that the test owns: no second is measured here."""

import dataclasses
import sys
import types

import pytest

from sophia.lab.config.run import Evaluation, Optimizer
from sophia.lab.forecast.comparison import Remaining
from sophia.lab.optimizers import third_party
from sophia.lab.support.errors import LabError
from sophia.lab.training import components, loop, position
from sophia.lab.training.pace import STEPS, Pace, mean, measure
from sophia.lab.training.run_folder import rows

CLOCK = """
import torch

now = 0.0


def spend(seconds):
    global now
    now += seconds


class Tick(torch.optim.SGD):
    # Takes 3 s to make, 1 s a step, and 4 s a step with a refresh.
    sophia_defaults = {"lr": 1e-3, "update_every": 10}

    def __init__(self, params, lr=1e-3, update_every=10):
        super().__init__(params, lr=lr)
        self.every, self.count = update_every, 0
        spend(3.0)

    def step(self, closure=None):
        spend(4.0 if self.count % self.every == 0 else 1.0)
        self.count += 1
        return super().step(closure)


class Bang(Tick):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.fill_(float("nan"))
"""


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """A module with its own time, which optimizers and evaluations spend, and which `train` looks at."""
    (tmp_path / "own_clock.py").write_text(CLOCK)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("own_clock")
    monkeypatch.setattr(
        position, "time", types.SimpleNamespace(monotonic=lambda: module.now, process_time=lambda: 0.0)
    )
    real = components.held_out_loss

    def held_out_loss(parts):
        module.spend(0.01 * len(parts.held_out))
        return real(parts)

    monkeypatch.setattr(components, "held_out_loss", held_out_loss)
    yield module
    del sys.modules["own_clock"]


def ticking(tiny, name="Tick", *, every=10, **changes):
    path = f"own_clock:{name}"
    settings = third_party.contender("tick", path).settings({"update_every": every})
    return dataclasses.replace(
        tiny(),
        optimizer=Optimizer("tick", settings),
        evaluation=Evaluation(every=20, sequences=64),
        **changes,
    )


@pytest.mark.parametrize("every", [1, 2, 10])
def test_the_forecast_of_a_run_is_what_the_run_takes(every, clock, tiny, ids, tmp_path):
    """Else the forecast would forget refreshes, evaluations or the start, or count them twice."""
    config = ticking(tiny, every=every, steps=60)
    pace = measure(config, ids, clock=lambda: clock.now)
    assert pace.step == pytest.approx({1: 4.0, 2: 2.5, 10: 1.3}[every])
    assert pace.evaluation == pytest.approx(0.64)  # though the probe evaluates on a quarter of the sequences
    assert pace.around == pytest.approx(3.0)
    before = clock.now
    result = loop.train(config, tmp_path, ids)
    assert result["seconds"] == pytest.approx(60 * pace.step)
    assert Remaining(config, 0).seconds(pace) == pytest.approx(clock.now - before)


def test_the_forecast_of_a_rest_is_what_the_rest_takes(clock, tiny, ids, tmp_path):
    """Else a resumed command would promise the time of all of it."""
    config = ticking(tiny, every=10, steps=60)
    pace = measure(config, ids, clock=lambda: clock.now)

    class Stop(BaseException):
        pass

    def report(progress):
        if progress.step == 30:
            raise Stop

    with pytest.raises(Stop):
        loop.train(config, tmp_path, ids, save_every=10, report=report)
    before = clock.now
    loop.train(config, tmp_path, ids)
    # The optimizer's own count begins anew, and with it the first of ten steps is a refresh.
    assert Remaining(config, 20).seconds(pace) == pytest.approx(clock.now - before)


def test_the_probe_leaves_nothing_and_changes_nothing(tiny, ids, tmp_path, monkeypatch):
    """Else a forecast would cost disk, or make another run of the one it speaks of."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    config = tiny("sophia-g", steps=20)
    pace = measure(config, ids)
    assert not list(tmp_path.glob("sophia-*"))  # torch keeps a folder of its own there
    assert min(pace.step, pace.evaluation) > 0
    assert pace.around >= 0
    result = loop.train(config, tmp_path / "a", ids)
    assert pace.state == 4 * result["parameters"] + result["state_bytes"]
    assert result["loss"] == loop.train(config, tmp_path / "b", ids)["loss"]


def test_the_forecast_of_the_disk_is_what_a_run_takes(tiny, ids, tmp_path):
    """Else a disk would be full after a night that was said to fit."""
    config = tiny("sophia-g", steps=40)
    pace = measure(config, ids)
    for save_every, files in ((100, 0), (25, 1), (10, 2)):
        folder = tmp_path / str(save_every)
        loop.train(config, folder, ids, save_every=save_every)
        assert len(list(folder.rglob("checkpoint*.pt"))) == files
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert Remaining(config, 0).disk(pace, save_every) == pytest.approx(used, rel=0.1, abs=10_000)


def test_a_contender_that_diverges_at_once_has_no_pace(clock, tiny, ids):
    """Else a forecast would rest on the steps of a run that does none."""
    with pytest.raises(LabError, match=f"diverged within {STEPS} steps"):
        measure(ticking(tiny, "Bang"), ids)


def test_workers_side_by_side_are_averaged():
    """Else the pace of whoever was measured last would stand for all."""
    one = Pace(step=1.0, evaluation=2.0, around=6.0, state=8)
    assert mean([one, Pace(step=2.0, evaluation=4.0, around=7.0, state=8)]) == Pace(1.5, 3.0, 6.5, 8)


def test_the_evaluations_of_a_real_run_are_counted_right(tiny, ids, tmp_path):
    """Else the arithmetic of evaluations would be right for round numbers only."""
    one = Pace(step=0.0, evaluation=1.0, around=0.0, state=0)
    for steps, every in ((20, 10), (23, 10), (7, 100)):
        config = tiny(steps=steps, log_every=5, evaluation=Evaluation(every=every, sequences=4))
        loop.train(config, tmp_path, ids)
        kinds = [row["kind"] for row in rows(tmp_path / config.hash)]
        assert Remaining(config, 0).seconds(one) == kinds.count("eval")
