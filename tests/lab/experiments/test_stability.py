"""The experiment on stability: planted learning rates are found again, and the verdict follows them."""

from itertools import product

import pytest

from sophia.lab.experiments.framework import runner
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.stability import cells as cells_of_records
from sophia.lab.experiments.stability import experiment as stability

UNIGRAM = 3.0


def plant(folder, stable, *, clipped=None, gains=None, seeds=(1, 2, 3), rungs=4):
    """Records in which ``stable[contender, scaled]`` is the largest stable rung, by seed; -1 for none."""
    records = Records(folder)
    for contender, scaled, seed, rung in product(stability.CONTENDERS, (False, True), seeds, range(rungs)):
        kept = rung <= stable[contender, scaled][seed - 1]
        gain = (gains or {}).get(contender, 0.5)
        records.add(
            {
                "part": "trick",
                "contender": contender,
                "scaled": scaled,
                "lr": stability.LOWEST[contender] * 2**rung,
                "seed": seed,
            },
            loss=UNIGRAM - (gain if kept else 0.1 * gain),
            unigram=UNIGRAM,
            gradient_clipped=0.0,
        )
    for contender, seed in product(stability.ORDINARY_LR, seeds):
        records.add(
            {
                "part": "clipping",
                "contender": contender,
                "lr": stability.ORDINARY_LR[contender],
                "seed": seed,
            },
            loss=2.6,
            unigram=UNIGRAM,
            gradient_clipped=(clipped or {}).get(contender, 0.02),
        )
    return records


def kinds(**ours):
    """Largest stable rungs: of those named (without, with), of the others the same in both."""
    return {
        (c, s): [ours.get(c.replace("-", "_"), (2, 2))[s]] * 3
        for c in stability.CONTENDERS
        for s in (False, True)
    }


NOBODY = kinds()
CLAIMED = kinds(adamw=(1, 2), lion=(0, 2))
LOST = kinds(adamw=(-1, 2), lion=(-1, 1))
EVERYBODY = kinds(adamw=(-1, 2), lion=(-1, 1), sophia_g=(0, 2))
SOPHIA_ALONE = kinds(sophia_g=(-1, 2))
ADAMW_ALONE = kinds(adamw=(-1, 2))
CLIPS = {"adamw": 0.2, "lion": 0.15, "sophia-g": 0.01}


@pytest.mark.parametrize(
    ("stable", "clipped", "word"),
    [
        (CLAIMED, CLIPS, "holds"),
        (LOST, CLIPS, "holds"),
        (LOST, {}, "holds in part"),
        (ADAMW_ALONE, {}, "holds in part"),
        (NOBODY, CLIPS, "holds in part"),
        (NOBODY, {}, "not seen at this scale"),
        (EVERYBODY, {}, "contradicted"),
        (SOPHIA_ALONE, {}, "contradicted"),
        (EVERYBODY, CLIPS, "holds in part"),
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, stable, clipped, word):
    """A claim called shown, not seen or contradicted, against its own records."""
    records = plant(tmp_path, stable, clipped=clipped)
    found = {c.contender: c for c in cells_of_records.cells(records)}
    for contender in stability.CONTENDERS:
        start = stability.LOWEST[contender]
        for rates, scaled in ((found[contender].without, False), (found[contender].with_, True)):
            planted = stable[contender, scaled]
            assert rates == [start * 2**r if r >= 0 else None for r in planted]
    said = stability.verdict(records)
    assert said.word == word
    assert "24 layers" in said.sentence
    assert ("lost at every rate" in said.sentence) is any(-1 in rungs for rungs in stable.values())


def test_a_difference_of_one_seed_in_three_is_no_difference(tmp_path):
    """Noise of a single seed, read as an effect of the scaling."""
    records = plant(tmp_path, {**NOBODY, ("adamw", True): [3, 3, 2], ("lion", True): [2, 3, 2]})
    assert "for none" in stability.verdict(records).sentence


def test_who_learns_nothing_either_way_does_not_do_without_the_scaling(tmp_path):
    """An optimizer too slow to learn, praised for not minding."""
    records = plant(tmp_path, LOST, gains={"sophia-g": 0.05})
    said = stability.verdict(records)
    assert said.word == "not seen at this scale"
    assert "sophia-g learned too little either way to say" in said.sentence


@pytest.mark.parametrize(
    ("gains", "best", "found"),
    [
        ({1.0: 0.4, 2.0: 0.5, 4.0: 0.26, 8.0: 0.24}, 0.5, 4.0),
        ({1.0: 0.4, 2.0: float("-inf")}, 0.4, 1.0),
        ({1.0: 0.1, 2.0: 0.5}, 0.5, 2.0),  # a rate that is too small does not end the search
        ({1.0: 0.1, 2.0: 0.2}, 0.5, None),  # held to what is gained with the scaling
    ],
)
def test_a_rate_is_kept_when_it_gains_at_least_half(gains, best, found):
    """Another rule than the page states."""
    assert cells_of_records.largest_stable(gains, best) == found


def test_a_run_that_diverged_is_a_lost_rate(tmp_path):
    """A crash of the verdict, or a rate that stands because nothing was left to compare."""
    records = plant(tmp_path / "a", LOST)
    lines = (tmp_path / "a" / "records.jsonl").read_text().replace('"loss": 2.95', '"loss": null')
    (tmp_path / "a" / "records.jsonl").write_text(lines)
    gone = Records(tmp_path / "a")
    assert any(row.result["loss"] is None for row in gone.rows)
    assert stability.verdict(gone).word == stability.verdict(records).word
    stability.draw(gone)


def test_a_quick_run_makes_every_row_once(tmp_path):
    """A part that is never run, a picture that breaks, or a run that adds rows when it is done."""
    records = runner.run(stability.EXPERIMENT, tmp_path, Progress(), quick=True)
    trick, clipping = (records.where(part=part) for part in ("trick", "clipping"))
    assert len(trick) == 2 * 2 * 2 * len(stability.CONTENDERS)
    assert len(clipping) == 2 * len(cells_of_records.CLAIMED)
    assert all(row.result["gradient_clipped"] == 0 for row in trick)  # that part does not clip
    assert {cell.contender for cell in cells_of_records.cells(records)} == set(stability.CONTENDERS)
    assert runner.draw(stability.EXPERIMENT, records).exists()
    again = runner.run(stability.EXPERIMENT, tmp_path, Progress(), quick=True)
    assert len(again.rows) == len(records.rows)


def test_a_run_that_was_stopped_is_drawn(tmp_path):
    """An error in place of the picture of the rows so far."""
    plant(tmp_path, LOST)
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines()
    for rows in (1, 5, 40):
        path.write_text("\n".join(lines[:rows]) + "\n")
        stability.draw(Records(tmp_path))


def test_records_of_a_run_that_was_stopped_early_have_a_verdict(tmp_path):
    """A traceback where somebody looks at what there is so far."""
    records = Records(tmp_path)
    case = {"part": "trick", "contender": "adamw", "scaled": False, "lr": 1e-3, "seed": 1}
    records.add(case, loss=2.9, unigram=UNIGRAM)
    records.add({**case, "scaled": True, "lr": 2e-3}, loss=2.9, unigram=UNIGRAM)
    assert stability.verdict(records).word == "not seen at this scale"
