"""What a comparison costs: the verdict follows planted runs."""

import pytest

from sophia.lab.experiments import few_resources
from sophia.lab.experiments.framework.records import Records


def plant(folder, differences, *, seconds=40.0, megabytes=900.0, connections=0, lost=None):
    """Records in which Sophia-G ends so much above AdamW, by seed."""
    records = Records(folder)
    for seed, difference in enumerate(differences):
        for contender, loss in (("adamw", 5.0 + 0.1 * seed), ("sophia-g", 5.0 + 0.1 * seed + difference)):
            gone = lost == (contender, seed)
            records.add(
                {"contender": contender, "seed": seed},
                status="diverged" if gone else "finished",
                loss=None if gone else loss,
                parameters=735072,
                cpu_seconds=seconds,
                peak_megabytes=megabytes,
                connections=connections,
                curve=[[0, 8.0], [400, loss]],
            )
    return records


def test_runs_are_paired_by_seed_and_not_by_place(tmp_path):
    """Ends of two seeds subtracted, because a row was made again and stands last."""
    said = few_resources.verdict(plant(tmp_path / "a", (0.10, 0.11, 0.12))).sentence
    records = plant(tmp_path / "b", (0.10, 0.11, 0.12))
    lines = (tmp_path / "b" / "records.jsonl").read_text().splitlines()
    (tmp_path / "b" / "records.jsonl").write_text("\n".join([*lines[2:], lines[1], lines[0]]) + "\n")
    turned = Records(tmp_path / "b")
    assert [row.case["seed"] for row in turned.rows] != [row.case["seed"] for row in records.rows]
    assert few_resources.verdict(turned).sentence == said
    figure = few_resources.draw(turned)
    places = figure.axes[1].lines[1].get_xdata()
    assert list(places) == [0, 1, 2]


@pytest.mark.parametrize(
    ("differences", "changed", "word"),
    [
        ((0.10, 0.11, 0.12), {}, "holds in part"),
        ((-0.10, 0.11, 0.12), {}, "not seen at this scale"),
        ((0.10, 0.11, 0.12), {"seconds": 2000.0}, "not seen at this scale"),
        ((0.10, 0.11, 0.12), {"connections": 1}, "not seen at this scale"),
        ((0.10, 0.11, 0.12), {"lost": ("adamw", 1)}, "not seen at this scale"),
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, differences, changed, word):
    """Cheap and telling claimed of runs that were not."""
    records = plant(tmp_path, differences, **changed)
    said = few_resources.verdict(records)
    assert said.word == word
    if "lost" not in changed:
        told = "told apart" if min(differences) > 0 else "not told apart"
        assert f"3 paired seeds), {told} from no difference" in said.sentence
    few_resources.draw(records)
