"""The experiment on stability: planted learning rates are found again, and the verdict follows them."""

from itertools import product

import pytest

from sophia.lab.experiments import stability
from sophia.lab.experiments.framework.records import Records

UNIGRAM = 3.0


def plant(folder, stable, *, clipped=None, seeds=(1, 2, 3), rungs=6):
    """Records in which ``stable[contender, scaled]`` is the largest stable rung, by seed."""
    records = Records(folder)
    for depth, contender, scaled, seed, rung in product(
        (3, 24), stability.SETTINGS, (False, True), seeds, range(rungs)
    ):
        last = stable[contender, scaled][seed - 1]
        loss = 2.5 + 0.01 * abs(rung - 1) if rung <= last else 2.95
        records.add(
            {
                "contender": contender,
                "depth": depth,
                "scaled": scaled,
                "lr": stability.LOWEST[contender] * 2**rung,
                "seed": seed,
            },
            loss=loss,
            unigram=UNIGRAM,
            gradient_clipped=(clipped or {}).get(contender, 0.02),
        )
    return records


HELPS = {
    (c, s): [2, 2, 3] if not s or c == "sophia-g" else [3, 3, 4]
    for c in stability.SETTINGS
    for s in (False, True)
}
NOBODY = {key: [2, 3, 2] for key in HELPS}
CLIPS = {"adamw": 0.2, "lion": 0.15, "sophia-g": 0.01}


@pytest.mark.parametrize(
    ("stable", "clipped", "word"),
    [
        (HELPS, CLIPS, "holds"),
        (HELPS, {}, "holds in part"),
        (NOBODY, CLIPS, "holds in part"),
        (NOBODY, {}, "not seen at this scale"),
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, stable, clipped, word):
    """A claim called shown, or not seen, against its own records."""
    records = plant(tmp_path, stable, clipped=clipped)
    found = {(c.contender, c.depth): c for c in stability.cells(records)}
    for contender in stability.SETTINGS:
        cell = found[contender, 24]
        start = stability.LOWEST[contender]
        assert cell.without == [start * 2**r for r in stable[contender, False]]
        assert cell.with_ == [start * 2**r for r in stable[contender, True]]
        assert cell.bounded
        assert cell.losses == (pytest.approx(2.5), pytest.approx(2.5))
    said = stability.verdict(records)
    assert said.word == word
    assert "24 layers" in said.sentence


def test_a_difference_of_one_seed_in_three_is_no_difference(tmp_path):
    """Noise of a single seed, read as an effect of the scaling."""
    records = plant(tmp_path, {**NOBODY, ("adamw", True): [3, 3, 2], ("lion", True): [2, 4, 2]})
    assert "for none of them" in stability.verdict(records).sentence


@pytest.mark.parametrize(
    ("gains", "found"),
    [
        ({1.0: 0.4, 2.0: 0.5, 4.0: 0.26, 8.0: 0.24}, (4.0, True)),
        ({1.0: 0.4, 2.0: float("-inf")}, (1.0, True)),
        ({1.0: 0.1, 2.0: 0.5}, (2.0, False)),  # a rate that is too small is not lost
        ({1.0: -2.0, 2.0: -1.0, 4.0: float("-inf")}, (2.0, False)),  # nothing learned anywhere
    ],
)
def test_a_run_is_lost_when_it_gains_less_than_half(gains, found):
    """Another rule than the page states."""
    assert stability.largest_stable(gains) == found


def test_a_seed_climbs_until_it_has_met_its_limit(tmp_path, monkeypatch):
    """Hours spent on rates that are known to be too large, or a limit that was never met."""
    asked = []

    class Planted:
        def __init__(self):
            self.text = type("Text", (), {"unigram_entropy": lambda _: UNIGRAM})()

        def run(self, shape, contender, settings, *, seed, **_):
            contender = "sophia-g" if contender == "ablated" else contender
            asked.append(
                (contender, shape.model.layers, shape.model.scale_attention_by_layer, settings["lr"], seed)
            )
            lost = settings["lr"] > stability.LOWEST[contender] * 2**seed
            return {"loss": 2.95 if lost else 2.5, "gradient_clipped": 0.0}

    monkeypatch.setattr(stability.Bench, "on_bytes", lambda progress: Planted())
    monkeypatch.setattr(stability, "RUNGS", 5)
    records = Records(tmp_path)
    stability.run(False, records, stability.Progress())
    per_kind = len(asked) / (len(stability.DEPTHS) * 2 * len(stability.SETTINGS))
    assert per_kind == 3 + 4 + 5  # a rung beyond the largest that each seed stands
    assert all(
        c.without == [stability.LOWEST[c.contender] * 2**s for s in (1, 2, 3)]
        for c in stability.cells(records)
    )
