import multiprocessing
import os
import signal

import pytest

from sophia.lab.support.errors import LabError
from sophia.lab.training import loop
from sophia.lab.training.run_folder import Record
from sophia.lab.training.workers import Events, execute


class Heard(Events):
    """Remembers what happened; kills the process of a run at its first report, so often."""

    def __init__(self, kills=0):
        self.kills, self.all = kills, []
        # Others may have children in this process, as the tests of several ranks do.
        self.others = set(multiprocessing.active_children())

    def progress(self, run, step, loss, unclipped):
        if self.kills:
            self.kills -= 1
            for child in set(multiprocessing.active_children()) - self.others:
                os.kill(child.pid, signal.SIGKILL)

    def ended(self, run, result):
        self.all.append(("ended", run.seed, result["status"]))

    def died(self, run, attempt):
        self.all.append(("died", run.seed, attempt))

    def failed(self, run, reason):
        self.all.append(("failed", run.seed, reason))


def test_runs_end_as_they_would_alone_even_if_a_worker_is_killed(tiny, ids, tmp_path):
    """Else a comparison would depend on how its runs were spread, or be lost with one process."""
    configs = [tiny("sophia-g", seed=seed, steps=60) for seed in (1, 2)]
    heard = Heard(kills=1)
    execute(configs, tmp_path / "crew", workers=1, events=heard, save_every=10)
    assert heard.all[0] == ("died", 1, 1)
    assert heard.all[1:] == [("ended", 1, "finished"), ("ended", 2, "finished")]
    for config in configs:
        alone = loop.train(config, tmp_path / "alone", ids)
        assert Record(tmp_path / "crew", config).result()["loss"] == alone["loss"]
    heard = Heard()
    execute(configs, tmp_path / "crew", workers=2, events=heard)
    assert heard.all == []


def test_a_run_that_fails_is_named_and_the_others_are_done(tiny, ids, tmp_path):
    """Else one bad run would cost a night's comparison, or pass unnoticed."""
    good, bad = tiny(seed=1), tiny(seed=2, device="cuda")
    heard = Heard()
    with pytest.raises(LabError, match=r"adamw, 24 steps, seed 2: .*for a GPU"):
        execute([bad, good], tmp_path, workers=1, events=heard)
    assert ("ended", 1, "finished") in heard.all
    assert "for a GPU" in (tmp_path / bad.hash / "attempts.jsonl").read_text()
