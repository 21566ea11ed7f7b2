"""From the command to the verdict with real runs whose answer is known: AdamW that wastes half its steps.

The statistics alone, with their coverage, are held in test_statistics.py by simulation.
"""

import json

import pytest

from sophia.lab import cli
from sophia.lab.analysis.verdict import summarise

WASTEFUL = """
import torch


class Wasteful(torch.optim.AdamW):
    sophia_defaults = {"lr": LR, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}

    def __init__(self, params, lr, beta1, beta2, weight_decay):
        super().__init__(params, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 2:
            super().step()
"""


def test_adamw_that_wastes_half_of_its_steps_is_found_slower(text_file, tmp_path, monkeypatch, capsys):
    """If this fails a handicap of a factor of two can hide between the records and the verdict."""
    (tmp_path / "wasteful_of_test.py").write_text(WASTEFUL.replace("LR", "3e-3"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "compare",
        "wasteful=wasteful_of_test:Wasteful",
        "--preset",
        "tiny",
        "--data",
        str(text_file),
    ]
    arguments += ["--budgets", "15", "--budgets", "30", "--budgets", "60", "--seeds", "3", "--workers", "1"]
    for setting in ("lr=3e-3", "beta1=0.9", "beta2=0.95", "weight_decay=0.1"):
        arguments += ["--set", f"adamw.{setting}"]
    cli.main([*arguments, "--out", "planted"])
    said = " ".join(capsys.readouterr().out.split())
    summary = summarise(tmp_path / "planted")
    (verdict,) = summary.verdicts
    assert (verdict.contender, verdict.word) == ("wasteful", "slower")
    assert "slower than adamw" in said
    ratios = {s.cost: s.ratio for s in verdict.speedups}
    assert set(ratios) >= {"steps", "tokens", "gradient evaluations", "FLOPs", "seconds"}
    assert ratios["steps"].value == pytest.approx(0.5, abs=0.15)
    assert ratios["steps"].high < 1
    assert verdict.half_budget is not None
    assert "No" in verdict.half_budget.sentence
    plan = json.loads((tmp_path / "planted" / "comparison.json").read_text())
    assert len(plan["runs"]) == 2 * 3 * 3
