"""The parts of the loss against the whole, and the quadratic against closed forms."""

import pytest
import torch

from sophia.lab.experiments.condition_number import descents
from sophia.lab.experiments.condition_number.convex_problems import Valley, rotation, spectrum
from sophia.lab.experiments.even_progress import allocation, experiment
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records


def test_simpsons_parts_are_exact_up_to_cubic_gradients():
    """Parts that do not add up. L = sum c_i x_i^4: the change of each coordinate is known."""
    c = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    start, end = torch.randn(2, 3, dtype=torch.float64)
    gradients = [4 * c * x**3 for x in (start, (start + end) / 2, end)]
    parts = allocation.simpson(end - start, *gradients)
    torch.testing.assert_close(parts, c * (end**4 - start**4))


def test_tenths_hold_equally_many_flattest_first():
    """A bucket called sharp that is not, or one with half of the coordinates because of ties."""
    h = torch.tensor([5.0] * 10 + [0.0] * 10 + [100.0])
    assert allocation.tenths(h).bincount().tolist() == [3, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert allocation.tenths(h)[-1] == 9
    assert allocation.tenths(h)[10:20].max() < allocation.tenths(h)[:10].min() + 1


@pytest.mark.parametrize("method", ["gradient descent", "Sophia"])
def test_the_parts_add_up_to_the_change_of_the_held_out_loss(method):
    """A step that was not seen, or a gradient at other weights than the step's. Steps so large that one
    application of Simpson's rule would be 8% off; what is left is its error and float32's.
    """
    contender, settings, lr = experiment.GPT[method]
    found = allocation.allocate(
        contender,
        {**settings, "lr": lr},
        steps=5,
        window=3,
        draws=2,
        seed=1,
        quick=True,
        progress=Progress(),
    )
    assert found["loss"] < found["first_loss"]
    assert found["allocated_over_actual"] == pytest.approx(1, abs=0.03)
    assert sum(found["decrease"]) == pytest.approx(found["first_loss"] - found["loss"], rel=0.03)
    assert found["curvature"] == sorted(found["curvature"])


def test_signs_move_every_tenth_by_the_step_size():
    """Distances that are not distances. The mean factor of warm-up and cosine over five steps is known; a
    few coordinates (the last position's) have no gradient and stay.
    """
    contender, settings, _ = experiment.GPT["SignGD"]
    found = allocation.allocate(
        contender,
        {**settings, "lr": 1e-3},
        steps=5,
        window=5,
        draws=1,
        seed=1,
        quick=True,
        progress=Progress(),
    )
    factors = [1.0, 1.0, 0.7625, 0.2875, 0.05]  # one step of warm-up, then down to 0.05 in three
    for distance in found["distance_a_step"]:
        assert distance == pytest.approx(1e-3 * sum(factors) / 5, rel=0.02)


def test_losses_by_dimension_of_gradient_descent():
    """Losses of other directions than the eigenvectors, or a path a step off. Each falls by (1 - s l)^2."""
    valley = Valley("quadratic", spectrum(5, 10.0), rotation(5, 2))
    start = valley.start(torch.full((1, 5), 0.2, dtype=torch.float64), 1.0)
    losses = descents.losses_by_dimension(
        "gradient descent", valley, start, 3, predictions=None, settings=[{"lr": 0.5}]
    )
    torch.testing.assert_close(losses[0, 0], torch.full((5,), 0.2, dtype=torch.float64))
    expected = 0.2 * (1 - 0.5 * valley.eigenvalues / 10) ** 6
    torch.testing.assert_close(losses[3, 0], expected)


def test_shares_and_ratios_of_tenths():
    """A verdict from the wrong half."""
    tenths = [1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert experiment.flattest_half(tenths) == 0.25
    assert experiment.move_ratio([2.0, *tenths, 3.0]) == 1.5


def plant(folder, *, left, noisy, toy, flat, moves):
    """Records in which methods have so much left of their worst dimension, and so on by method."""
    records = Records(folder)
    for start, predictions in experiment.STARTS:
        for method in experiment.QUADRATIC:
            worst = (left if predictions is None else noisy).get(method, 1.0)
            case = {"part": "quadratic", "start": start, "predictions": predictions, "method": method}
            records.add(case, left=[worst, worst / 2], eigenvalues=[1.0, 2.0])
    for method in ("gradient descent", "SignGD", "Adam", "Newton", "Sophia"):
        end = toy.get(method, 1.0)
        records.add({"part": "toy", "method": method}, losses=[[2.0, 2.0], [2.0 * end, end]])
    for method in experiment.GPT:
        for factor in (0.5, 1.0, 2.0):
            records.add({"part": "search", "method": method, "factor": factor}, loss=6.0)
        for seed in (1, 2, 3):
            share = flat.get(method, 0.3) + 0.01 * seed
            sharp = moves.get(method, 1.0)
            records.add(
                {"part": "allocation", "method": method, "seed": seed},
                factor={"SignGD": 2.0}.get(method, 1.0),
                decrease=[share / 5] * 5 + [(1 - share) / 5] * 5,
                distance_a_step=[1.0] * 9 + [sharp],
            )
    return records


BEST = {key: {"Sophia": 0.01} for key in ("left", "noisy", "toy")}


@pytest.mark.parametrize(
    ("planted", "word"),
    [
        ({**BEST, "flat": {"Sophia": 0.5}, "moves": {"Sophia": 0.5}}, "holds"),
        ({**BEST, "flat": {"Sophia": 0.2}, "moves": {"Sophia": 0.5}}, "holds in part"),
        ({**BEST, "flat": {"Sophia": 0.5}, "moves": {"Sophia": 2.0}}, "holds in part"),
        (
            {
                **{key: {"SignGD": 0.01} for key in ("left", "noisy", "toy")},
                "flat": {"Sophia": 0.2},
                "moves": {"Sophia": 2.0},
            },
            "contradicted",
        ),
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, planted, word):
    """Evenness claimed where another method, or another half of the coordinates, is ahead."""
    records = plant(tmp_path, **planted)
    said = experiment.verdict(records)
    assert said.word == word
    assert ("Sophia above AdamW in 3 of 3 seeds" in said.sentence) == (planted["flat"]["Sophia"] > 0.3)
    assert said.sentence.endswith("Best step sizes at the edge of those tried in the GPT: SignGD.")
    experiment.draw(records)
