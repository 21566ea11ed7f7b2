"""What it takes to tell two optimizers apart: the verdict follows planted runs."""

from pathlib import Path

import pytest

from sophia.lab.experiments.few_resources import experiment as few_resources
from sophia.lab.experiments.few_resources import newcomer
from sophia.lab.experiments.framework import runner
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records

ROOT = Path(__file__).parents[3]
CLEAR = (-0.50, -0.52, -0.51, -0.53)
LEVEL = (-0.10, 0.12, -0.12, 0.14)


def plant(folder, *, muon=CLEAR, spectral=CLEAR, calm=CLEAR, lost=None, **changed):
    """Records in which the others end so much from AdamW, by seed."""
    records = Records(folder)
    ends = {"adamw": (0.0,) * len(muon), "muon": muon, "sophia-spectral": spectral, "calm": calm}
    for seed in range(len(muon)):
        for contender, differences in ends.items():
            gone = lost == (contender, seed)
            loss = 5.0 + 0.1 * seed * (-1) ** seed + differences[seed]
            result = {"parameters": 623232, "cpu_seconds": 12.0, "peak_megabytes": 900.0, "connections": 0}
            records.add(
                {"contender": contender, "seed": seed},
                status="diverged" if gone else "finished",
                loss=None if gone else loss,
                curve=[[0, 8.0], [200, loss]],
                **{**result, **changed},
            )
    return records


def test_runs_are_paired_by_seed_and_not_by_place(tmp_path):
    """Ends of two seeds subtracted, because a row was made again and stands last."""
    said = few_resources.verdict(plant(tmp_path)).sentence
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[5:], *lines[4::-1]]) + "\n")
    turned = Records(tmp_path)
    assert [row.case["seed"] for row in turned.rows] != sorted(row.case["seed"] for row in turned.rows)
    assert few_resources.verdict(turned).sentence == said
    assert few_resources.differences(turned)[0].values == pytest.approx(CLEAR)


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, "holds in part"),
        ({"calm": LEVEL}, "holds in part"),  # a stranger's class may be level: it was measured
        ({"muon": LEVEL}, "not seen at this scale"),
        ({"spectral": LEVEL}, "not seen at this scale"),
        ({"muon": LEVEL, "spectral": LEVEL, "calm": LEVEL}, "not seen at this scale"),
        ({"cpu_seconds": 80.0}, "not seen at this scale"),  # two seeds take 5.3 minutes
        ({"peak_megabytes": 9000.0}, "not seen at this scale"),
        ({"connections": 1}, "not seen at this scale"),
        ({"lost": ("adamw", 1)}, "not seen at this scale"),
        ({"lost": ("muon", 2)}, "not seen at this scale"),
        ({"lost": ("calm", 0)}, "not seen at this scale"),
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, changed, word):
    """Cheap and telling claimed of runs that were not; or not of runs that were."""
    records = plant(tmp_path, **changed)
    said = few_resources.verdict(records)
    assert said.word == word
    assert ("diverged" in said.sentence) is ("lost" in changed)
    if changed.get("muon") is LEVEL:
        assert "muon +0.010 from adamw (-0.154 to +0.174, not told apart by 4 seeds)" in said.sentence
    if not changed:
        assert "muon -0.515 from adamw (-0.530 to -0.500, established after 2 seeds, 0.8 minutes)" in (
            said.sentence
        )
        assert "sophia-spectral +0.000 from muon" in said.sentence
    few_resources.draw(records)


@pytest.mark.parametrize(
    ("values", "seeds"),
    [
        ([-0.50, -0.51, -0.52, -0.51], 2),
        ([-0.1, -0.5, -0.5, -0.5], 4),
        ([-0.50, -0.51, 0.9, -0.5, -0.5], None),  # told by two, and no longer by three
        ([-0.50, -0.51, 0.2, -0.5, -0.5, -0.5, -0.5], 5),
        ([0.1, -0.1, 0.1, -0.1], None),
        ([-0.5], None),
    ],
)
def test_established_is_what_later_seeds_do_not_take_back(values, seeds):
    """A lucky look after two seeds, counted as the end of the matter."""
    difference = few_resources.Difference("muon", "adamw", values, [60.0] * len(values))
    assert difference.established == seeds
    assert difference.minutes == seeds


def test_what_is_the_same_on_other_seeds_is_said(tmp_path):
    """A noise that finds differences everywhere, unseen."""
    sentence = few_resources.verdict(plant(tmp_path)).sentence
    assert "AdamW from itself on other seeds, 2 pairs" in sentence
    assert "not told apart. Whether" in sentence


def test_the_stranger_is_the_class_of_the_page():
    """An experiment on a newcomer's class that no newcomer is shown."""
    page = ROOT / "docs/third-party.md"
    if not page.exists():
        pytest.skip("docs are not in the source distribution")
    assert f"```python\n{newcomer.STRANGER}```" in page.read_text()


def test_a_quick_run_makes_every_row_once_and_leaves_no_module_behind(tmp_path, monkeypatch):
    """A class of a deleted folder that stays importable, a picture that breaks, or rows made twice."""
    import sys

    before = list(sys.path)
    records = runner.run(few_resources.EXPERIMENT, tmp_path, Progress(), quick=True)
    assert sys.path == before
    assert newcomer.MODULE not in sys.modules
    assert [row.case["contender"] for row in records.rows] == list(few_resources.SETTINGS) * 3
    assert all(row.result["connections"] == 0 and row.result["status"] == "finished" for row in records.rows)
    assert len(few_resources.differences(records)) == len(few_resources.PAIRS)
    assert runner.draw(few_resources.EXPERIMENT, records).exists()
    few_resources.verdict(records)
    again = runner.run(few_resources.EXPERIMENT, tmp_path, Progress(), quick=True)
    assert len(again.rows) == len(records.rows)
