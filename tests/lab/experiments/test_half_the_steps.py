"""Half the steps: planted gaps, the line through them, and what the verdict makes of it."""

import json
import random

import numpy as np
import pytest
from scipy import stats
from synthetic import Planted, write_comparison

from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.half_the_steps import experiment, figure, gaps
from sophia.lab.support.errors import LabError

SIZES = {"a": 3e5, "b": 7e5, "c": 1.1e6, "d": 3e6}


def plant(folder, gap, *, sizes=SIZES, seeds=(1, 2, 3), noise=0.005):
    """Records in which Sophia-G at T/2 ends ``gap(parameters)`` above AdamW at T."""
    draw, records = random.Random(1), Records(folder)
    for size, n in sizes.items():
        for contender, steps, loss in (
            ("adamw", 400, 5.3), ("adamw", 800, 5.0),
            ("sophia-g", 400, 5.0 + gap(n)), ("sophia-g", 800, 4.9 + gap(n)),
        ):  # fmt: skip
            for seed in seeds:
                records.add(
                    {"size": size, "contender": contender, "steps": steps, "seed": seed},
                    status="finished", loss=loss + 0.01 * seed + draw.gauss(0, noise), parameters=n,
                )  # fmt: skip
    return records


@pytest.mark.parametrize(
    ("gap", "word", "of"),
    [
        (lambda n: -0.1, "holds", "4 of 4"),
        (lambda n: 0.3, "not seen at this scale", "0 of 4"),
        (lambda n: 0.2 if n < 2e6 else -0.1, "holds in part", "1 of 4"),
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, gap, word, of):
    """The paper's main claim, called seen or not against the runs."""
    records = plant(tmp_path, gap)
    said = experiment.verdict(records)
    assert said.word == word
    assert f"enough at {of} sizes" in said.sentence
    for found in gaps.gaps(records):
        assert found.difference.value == pytest.approx(gap(found.parameters), abs=0.02)
        assert found.steps == 800
    figure.draw(records)


def test_the_line_and_its_interval_are_those_of_a_regression(tmp_path):
    """An extrapolation whose uncertainty is that of the points, not that of a further one."""
    gap = lambda n: 0.3 - 0.1 * np.log10(n / 3e5) + 0.03 * np.sin(n)
    found = gaps.gaps(plant(tmp_path, gap))
    fit = gaps.line(found)
    x, y = np.log10([g.parameters for g in found]), np.array([g.difference.value for g in found])
    other = stats.linregress(x, y)
    at = np.log10(125e6)
    value, low, high = fit.at(125e6)
    assert value == pytest.approx(other.intercept + other.slope * at)
    rest = y - other.intercept - other.slope * x
    error = np.sqrt(rest @ rest / 2 * (1 + 1 / 4 + (at - x.mean()) ** 2 / ((x - x.mean()) @ (x - x.mean()))))
    assert (low, high) == pytest.approx((value - 2.919986 * error, value + 2.919986 * error), rel=1e-5)


def test_two_sizes_make_no_line(tmp_path):
    """A line through two points, with an interval of nothing."""
    records = plant(tmp_path, lambda n: 0.1, sizes={"a": 3e5, "b": 7e5})
    assert gaps.line(gaps.gaps(records)) is None
    assert "straight line" not in experiment.verdict(records).sentence


def test_half_a_comparison_is_not_read(tmp_path):
    """Ends of the seeds that happened to be done, taken for a result."""
    folder = tmp_path / "half-3m"
    write_comparison(folder, Planted())
    records = Records(tmp_path / "records")
    gone = next(folder.glob("runs/*/result.json"))
    kept = gone.read_text()
    gone.unlink()
    experiment._read(records, "half-3m", folder)
    assert not records.rows
    gone.write_text(kept)
    experiment._read(records, "half-3m", folder)
    assert {r.case["contender"] for r in records.rows} == {"adamw", "sophia-g"}


def test_a_comparison_of_older_numbers_is_not_read(tmp_path):
    """Rows of an estimator that is gone, noted as made today."""
    folder = tmp_path / "half-3m"
    write_comparison(folder, Planted())
    for file in folder.glob("runs/*/result.json"):
        result = json.loads(file.read_text())
        result["environment"]["numerics"] = "gnb 2, paper 1"
        file.write_text(json.dumps(result))
    records = Records(tmp_path / "records")
    with pytest.raises(LabError, match="gnb 2; today gnb 3"):
        experiment._read(records, "half-3m", folder)
    assert not records.rows


def test_the_packaged_protocols_are_of_the_stated_sizes_and_search_both_alike():
    """A protocol that is refused after it was published, or that searches one contender more."""
    from sophia.lab.config.run import Model
    from sophia.lab.models.size import parameters

    sizes = {"half-300k": 0.28e6, "quick": 0.735e6, "million": 1.1e6, "half-3m": 3.0e6, "half-10m": 10e6}
    for name, size in sizes.items():
        protocol = experiment._protocol(name, quick=False)
        assert isinstance(protocol.model, Model)
        assert parameters(protocol.model) == pytest.approx(size, rel=0.05)
        assert max(protocol.budgets) == 800
        assert 400 in protocol.budgets
        assert set(protocol.search.spaces) >= {"adamw", "sophia-g"} or name == "quick"
