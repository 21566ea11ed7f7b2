"""The verdicts against a planted truth: simulated end losses whose curve, noise and handicaps are known."""

from __future__ import annotations

import dataclasses
import json
import re
from math import inf, sqrt
from pathlib import Path

import numpy as np
import pytest
from synthetic import Planted, end_loss, planted_ends, run_name, write_comparison

from sophia.lab.analysis.cost_ratio import cost_ratio, in_cost
from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.analysis.seed_noise import (
    Noise,
    NoiseByBudget,
    contrast,
    noise_by_budget,
    resolvable,
    seeds_needed,
)
from sophia.lab.analysis.speedup import Curve, Ratio, curve_of, speedup
from sophia.lab.analysis.steps_to_target import reach
from sophia.lab.analysis.verdict import Row, summarise
from sophia.lab.analysis.verdict_words import ratio_words
from sophia.lab.support.errors import LabError

REPETITIONS = 200
# A true coverage of 0.90 gives 180 of 200 with a standard deviation of 4.2: 170 to 190 is 2.4 of them.
COVERED = (0.85, 0.95)

SAME = {"adamw": 1.0, "again": 1.0}
HALF = {"adamw": 1.0, "wasteful": 0.5}


def _loss_difference(planted: Planted, name: str, rng: np.random.Generator):
    ends = planted_ends(planted, rng)
    full = planted.budgets[-1]
    return contrast(ends, {(name, full): 1.0, ("adamw", full): -1.0}, noise_by_budget(ends))


@pytest.mark.parametrize(
    ("seeds", "budgets", "own"),
    [(2, (300, 600), False), (3, (300, 600, 1200), False), (6, (300, 600), True)],
    ids=["2 seeds pooled", "3 seeds pooled", "6 seeds own"],
)
def test_the_interval_of_the_difference_covers_at_its_rate(seeds, budgets, own) -> None:
    """If this fails the stated 90% is a false statement: too many or too few verdicts."""
    planted = Planted(efficiency=HALF, seeds=range(seeds), budgets=budgets)
    truth = end_loss(0.5 * budgets[-1]) - end_loss(budgets[-1])
    rng = np.random.default_rng(5)
    found = [_loss_difference(planted, "wasteful", rng) for _ in range(REPETITIONS)]
    assert all(e.own is own for e in found)
    assert COVERED[0] <= np.mean([e.low <= truth <= e.high for e in found]) <= COVERED[1]


@pytest.mark.parametrize("common", [0.0, 0.8])
@pytest.mark.parametrize(
    ("weights", "truth"),
    [
        ({("wasteful", 1200): 1.0, ("adamw", 1200): -1.0}, end_loss(600) - end_loss(1200)),
        ({("wasteful", 600): 1.0, ("adamw", 1200): -1.0}, end_loss(300) - end_loss(1200)),
        ({("wasteful", 1200): 1.0, ("adamw", 600): -0.5, ("adamw", 300): -0.5},
         end_loss(600) - (end_loss(600) + end_loss(300)) / 2),
        ({(c, b): w / 2 for c, w in (("wasteful", 1.0), ("adamw", -1.0)) for b in (600, 1200)},
         (end_loss(300) + end_loss(600)) / 2 - (end_loss(600) + end_loss(1200)) / 2),
    ],
    ids=["one budget", "half the budget", "between budgets", "two budgets"],
)  # fmt: skip
def test_budgets_with_one_trunk_are_not_counted_as_independent(weights, truth, common) -> None:
    """If this fails, runs that share most of their steps narrow an interval as if they were new ones: 90%
    would not be 90%. How much they have in common is not known, so the interval may be wider, not narrower.
    """
    planted = Planted(efficiency=HALF, seeds=range(3), budgets=(300, 600, 1200), common=common)
    rng, held, naive = np.random.default_rng(11), [], []
    for _ in range(REPETITIONS):
        ends = planted_ends(planted, rng)
        for linked, found in ((True, held), (False, naive)):
            estimate = contrast(ends, weights, noise_by_budget(ends, linked=linked))
            found.append(estimate.low <= truth <= estimate.high)
    assert np.mean(held) >= COVERED[0]
    assert np.mean(held) >= np.mean(naive)
    if common and len({b for c, b in weights if c == "wasteful"}) > 1:
        assert np.mean(naive) < 0.9, "else there would be nothing to correct"


@pytest.mark.parametrize("seeds", [2, 6])
def test_the_baseline_against_itself_is_rarely_called_different(seeds) -> None:
    """If this fails, noise is sold as a result: at the 90% level one comparison in ten may be called, no
    more.
    """
    planted = Planted(efficiency=SAME, seeds=range(seeds))
    rng = np.random.default_rng(6)
    called = np.mean([_loss_difference(planted, "again", rng).sign != 0 for _ in range(REPETITIONS)])
    assert 1 - COVERED[1] <= called <= 1 - COVERED[0]


@pytest.mark.parametrize(
    ("seeds", "budgets"), [(2, (300, 600)), (3, (150, 300, 600, 1200)), (6, (300, 600))], ids=str
)
def test_half_the_steps_wasted_is_a_speedup_of_one_half(seeds, budgets) -> None:
    """If this fails the speed-up or its interval is wrong where the answer is known: slower, 0.5 inside."""
    planted = Planted(efficiency=HALF, seeds=range(seeds), budgets=budgets)
    rng = np.random.default_rng(7)
    found = []
    for _ in range(REPETITIONS):
        ends = planted_ends(planted, rng)
        noise = noise_by_budget(ends)
        curve = curve_of(ends, "adamw", noise)
        assert isinstance(curve, Curve)
        ratio = speedup(ends, "wasteful", "adamw", curve, noise)
        assert ratio is not None
        assert ratio.low is not None
        assert ratio.high is not None
        assert ratio.verdict == "slower"
        found.append(ratio)
    assert np.median([r.value for r in found]) == pytest.approx(0.5, abs=0.01)
    covered = np.mean([r.low <= 0.5 <= r.high for r in found])
    # Two budgets do not tell the exponent, and the interval is wider by all that it could be.
    assert COVERED[0] <= covered <= (COVERED[1] if len(budgets) > 2 else 1)


def test_the_speedup_includes_one_exactly_when_the_loss_interval_includes_zero() -> None:
    """If this fails the table and the sentence can contradict each other."""
    planted = Planted(efficiency={"adamw": 1.0, "near": 0.97}, seeds=(0, 1, 2))
    rng = np.random.default_rng(8)
    seen = set()
    for _ in range(30):
        ends = planted_ends(planted, rng)
        noise = noise_by_budget(ends)
        curve = curve_of(ends, "adamw", noise)
        assert isinstance(curve, Curve)
        ratio = speedup(ends, "near", "adamw", curve, noise)
        difference = contrast(ends, {("near", 600): 1.0, ("adamw", 600): -1.0}, noise)
        assert ratio.verdict == {1: "slower", -1: "faster", 0: "not distinguishable"}[difference.sign]
        seen.add(difference.sign)
    assert seen >= {0, 1}, "both outcomes must have been tried"


def test_the_noise_is_the_planted_one_with_its_degrees_of_freedom() -> None:
    """If this fails every pooled interval has the wrong width; the mean of 100 variances is within 4
    standard errors.
    """
    planted = Planted(efficiency={"adamw": 1.0, "b": 0.9, "c": 0.8}, seeds=(0, 1, 2))
    rng = np.random.default_rng(9)
    found = [noise_by_budget(planted_ends(planted, rng)).at for _ in range(100)]
    mean = planted.shared**2 + planted.rest**2 / 3
    for budget in planted.budgets:
        noises = [at[budget] for at in found]
        assert {(n.degrees, n.mean_degrees) for n in noises} == {((3 - 1) * (3 - 1), 3 - 1)}
        rest = np.mean([n.rest**2 for n in noises])
        assert rest == pytest.approx(planted.rest**2, rel=4 * sqrt(2 / 4 / 100))
        assert np.mean([n.mean**2 for n in noises]) == pytest.approx(mean, rel=4 * sqrt(2 / 2 / 100))


def _with_late_runs(planted: Planted, rng: np.random.Generator) -> dict:
    """Runs of the first budget spread by twenty times as much: those that have left a plateau, and others."""
    ends = planted_ends(planted, rng)
    first = planted.budgets[0]
    return {
        k: y + (20 * planted.rest * rng.standard_normal() if k[1] == first else 0) for k, y in ends.items()
    }


def test_late_runs_at_a_short_budget_say_nothing_of_a_long_one() -> None:
    """If this fails one run that was late at 400 steps turns the verdict at 800 where all runs agree."""
    planted = Planted(efficiency=HALF, seeds=range(3), budgets=(300, 600))
    truth = end_loss(300) - end_loss(600)
    rng, quiet, late = np.random.default_rng(13), [], []
    weights = {("wasteful", 600): 1.0, ("adamw", 600): -1.0}
    for _ in range(REPETITIONS):
        plain, spread = planted_ends(planted, rng), _with_late_runs(planted, rng)
        quiet.append(contrast(plain, weights, noise_by_budget(plain)))
        late.append(contrast(spread, weights, noise_by_budget(spread)))
    assert COVERED[0] <= np.mean([e.low <= truth <= e.high for e in late]) <= COVERED[1]
    widths = [np.median([e.high - e.low for e in found]) for found in (quiet, late)]
    assert widths[1] == pytest.approx(widths[0], rel=0.3)


def test_a_contender_whose_runs_were_lost_says_nothing_of_the_others() -> None:
    """If this fails one diverged run of a third contender takes the intervals of all the others."""
    planted = Planted(efficiency={**HALF, "lost": 1.0}, seeds=(0, 1), budgets=(300, 600))
    ends = planted_ends(planted, np.random.default_rng(15))
    del ends["lost", 600, 1]
    found = contrast(ends, {("wasteful", 300): 1.0, ("adamw", 600): -1.0}, noise_by_budget(ends))
    assert found.low is not None
    noise = noise_by_budget(ends).at[600]
    assert (noise.contenders, noise.mean_degrees) == (2, 1)


def test_a_budget_whose_noise_is_not_known_determines_no_curve() -> None:
    """If this fails one seed a budget counts as a budget without noise, and the exponent as measured."""
    ends = {("adamw", b, s): 3.6 + 1.25 * (b / 1200) ** -0.45 for b in (300, 600, 1200) for s in (0, 1)}
    ends |= {("b", b, s): y + 0.01 * s for (_, b, s), y in ends.items()}
    assert curve_of(ends, "adamw", noise_by_budget(ends)).power is not None
    alone = {key: y for key, y in ends.items() if key[1] == 300 or key[2] == 0}
    assert curve_of(alone, "adamw", noise_by_budget(alone)).power is None


@pytest.mark.parametrize("linked", [False, True])
def test_a_contrast_between_budgets_has_the_noise_of_both(linked) -> None:
    """If this fails "half the steps are enough" is said with the noise of one end alone."""
    planted = Planted(efficiency=HALF, seeds=range(3), budgets=(300, 600))
    truth = end_loss(300) - end_loss(300)
    rng, held = np.random.default_rng(14), []
    for _ in range(REPETITIONS):
        ends = _with_late_runs(planted, rng)
        found = contrast(
            ends, {("wasteful", 600): 1.0, ("adamw", 300): -1.0}, noise_by_budget(ends, linked=linked)
        )
        held.append(found.low <= truth <= found.high)
    # The largest variance that a link could make, and the fewest degrees: wider than needed, never narrower.
    assert COVERED[0] <= np.mean(held) <= (1 if linked else 0.97)


def test_a_missing_seed_costs_degrees_of_freedom_and_not_the_seed_effect() -> None:
    """If this fails an unfinished comparison mixes the difference of two seeds into the difference of two
    contenders.
    """
    ends = {("a", 8, 0): 3.0, ("a", 8, 1): 3.5, ("a", 8, 2): 9.0, ("b", 8, 0): 3.1, ("b", 8, 1): 3.6}
    noise = noise_by_budget(ends)
    assert noise.at[8].degrees == 1
    assert contrast(ends, {("b", 8): 1.0, ("a", 8): -1.0}, noise).value == pytest.approx(0.1)


@pytest.mark.parametrize("contenders", [("adamw",), ("adamw", "b")])
def test_one_seed_gives_no_interval_and_no_verdict(contenders) -> None:
    """If this fails a single run is given a spread it cannot have."""
    ends = planted_ends(
        Planted(efficiency=dict.fromkeys(contenders, 1.0), seeds=(0,)), np.random.default_rng(0)
    )
    estimate = contrast(ends, {(contenders[-1], 600): 1.0}, noise_by_budget(ends))
    assert estimate.low is None
    assert estimate.sign == 0


def test_a_fitted_power_law_returns_its_own_parameters() -> None:
    """If this fails the curve of three or more budgets is not the one its formula says."""
    ends = {("adamw", b, s): 3.6 + 1.25 * (b / 1200) ** -0.45 for b in (150, 300, 600, 1200) for s in (0, 1)}
    quiet = Noise(0.001, 4, 0.001, 4, 2)
    curve = curve_of(ends, "adamw", NoiseByBudget(dict.fromkeys((150, 300, 600, 1200), quiet)))
    assert curve.power == pytest.approx((1.25, 0.45, 3.6), rel=1e-3)
    assert curve.weights(600).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("losses", "words"),
    [({300: 4.0}, "1 budget; a speed-up needs two"), ({300: 4.0, 600: 4.1}, "does not fall")],
)
def test_without_a_falling_curve_there_is_a_reason_instead_of_a_speedup(losses, words) -> None:
    """If this fails a speed-up is read off a curve on which no budget belongs to a loss."""
    ends = {("adamw", b, s): y for b, y in losses.items() for s in (0, 1)}
    assert words in curve_of(ends, "adamw", noise_by_budget(ends))


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(0.8, 0.7, 0.9, 0.5, 2.0, False, ""), "0.80x (0.70 to 0.90)"),
        (Ratio(0.0, 0.0, 0.0, 0.5, 2.0, True, ""), "less than 0.5x (extrapolated)"),
        (Ratio(inf, 1.5, inf, 0.5, 2.0, True, ""), "more than 2x (1.50 to more than 2; extrapolated)"),
        (Ratio(0.98, 0.95, 0.9962, 0.5, 2.0, False, ""), "0.98x (0.95 to 0.9962)"),
        (Ratio(1.2, None, None, 0.5, 2.0, True, ""), "1.20x (no interval; extrapolated)"),
    ],
)
def test_a_speedup_is_put_in_words_that_claim_no_more_than_the_interval(ratio, words) -> None:
    """If this fails a capped, extrapolated or rounded bound reads as a measured one."""
    assert ratio_words(ratio) == words


def test_a_costlier_step_turns_a_tie_in_steps_into_slower_in_seconds() -> None:
    """If this fails the Hessian passes are free again."""
    tie = Ratio(1.0, 0.97, 1.03, 0.5, 2.0, False, "")
    moved = in_cost(tie, cost_ratio([(1.0, 1.2), (1.0, 1.2), (1.1, 1.32)]))
    assert (moved.value, moved.verdict) == (pytest.approx(1 / 1.2), "slower")
    noisy = in_cost(tie, cost_ratio([(1.0, 1.2), (1.0, 0.9), (1.1, 1.32)]))
    assert noisy.verdict == "not distinguishable"
    assert in_cost(tie, cost_ratio([(1.0, 1.2)])).low is None, "one measured pair has no interval"


def test_the_power_line_agrees_with_a_simulation() -> None:
    """If this fails the advice how many seeds to run is wrong: 0.8 within 3 standard deviations of 200
    repetitions.
    """
    noise = Noise(rest=0.008, degrees=8, mean=0.0, mean_degrees=0, contenders=2)
    seeds = seeds_needed(noise, 0.01, at_least=2)
    planted = Planted(efficiency=SAME, seeds=range(seeds), budgets=(600,), rest=noise.rest)
    rng, found = np.random.default_rng(10), 0
    for _ in range(REPETITIONS):
        ends = {key: y + 0.01 * (key[0] == "again") for key, y in planted_ends(planted, rng).items()}
        difference = contrast(ends, {("again", 600): 1.0, ("adamw", 600): -1.0}, noise_by_budget(ends))
        found += difference.sign > 0
    assert found / REPETITIONS == pytest.approx(0.8, abs=3 * sqrt(0.8 * 0.2 / REPETITIONS))
    assert resolvable(noise, seeds, seeds - 1) <= 0.01 < resolvable(noise, seeds - 1, seeds - 2)


def test_the_target_is_read_off_the_curve_of_ends_with_coverage() -> None:
    """If this fails steps-to-target is wrong where it is known: its interval must hold the truth at its rate
    or above it (0.9 less 2.4 standard deviations of 200 repetitions; its variance is the largest possible).
    """
    planted = Planted(efficiency=SAME, seeds=range(3), budgets=(300, 600, 1200))
    rng, found = np.random.default_rng(12), []
    target = end_loss(800)
    for _ in range(REPETITIONS):
        ends = planted_ends(planted, rng)
        rows = [
            _ends_row("adamw", b, np.mean([ends["adamw", b, s] for s in range(3)])) for b in (300, 600, 1200)
        ]
        found.append(reach(rows, ends, "adamw", target, noise_by_budget(ends)))
    assert {r.budget for r in found} == {1200}
    assert np.median([r.steps for r in found]) == pytest.approx(800, rel=0.03)
    assert np.mean([r.low <= 800 <= r.high for r in found]) >= COVERED[0]


def _ends_row(contender: str, steps: int, loss: float, diverged: int = 0) -> Row:
    blank = {f.name: None for f in dataclasses.fields(Row)}
    return Row(**{**blank, "contender": contender, "steps": steps, "loss": loss, "diverged": diverged})


@pytest.mark.parametrize(
    ("target", "diverged", "budget", "words"),
    [
        (9.0, 0, 300, "300 or fewer"),
        (1.0, 0, None, "more than 600"),
        (end_loss(600) + 0.001, 0, 600, r"59\d \(\d\d\d to more than 600\)"),
        (end_loss(600) + 0.001, 1, None, r"59\d .*"),
    ],
)
def test_a_target_outside_the_budgets_is_a_bound(target, diverged, budget, words) -> None:
    """If this fails steps are claimed that nobody trained, or a contender that diverged is said to arrive."""
    ends = {("adamw", b, s): end_loss(b) + 0.002 * s for b in (300, 600) for s in (-1, 0, 1)}
    ends |= {("b", b, s): end_loss(b) - 0.003 * s * s for b in (300, 600) for s in (-1, 0, 1)}
    rows = [_ends_row("adamw", b, end_loss(b), diverged) for b in (300, 600)]
    found = reach(rows, ends, "adamw", target, noise_by_budget(ends))
    assert found.budget == budget
    assert re.fullmatch(words, found.words)


def test_without_runs_or_a_curve_there_is_no_step_count() -> None:
    """If this fails one budget, or none, is turned into a number of steps."""
    ends = {("adamw", 300, s): 4.0 for s in (0, 1)}
    assert reach([_ends_row("adamw", 300, 4.0)], ends, "adamw", 4.5, noise_by_budget(ends)).words == "—"
    assert reach([], ends, "lion", 4.5, noise_by_budget(ends)).budget is None


@pytest.mark.parametrize("wsd", [False, True])
def test_what_was_spent_counts_a_trunk_once(tmp_path: Path, wsd: bool) -> None:
    """If this fails the sum of a comparison holds steps that nobody did, or hides some."""
    summary = summarise(write_comparison(tmp_path, Planted(wsd=wsd)))
    spent, alone = summary.spent, 4 * (300 + 600)
    assert spent.runs == 8
    assert spent.shared_steps == (4 * 240 if wsd else 0)
    assert spent.steps == alone - spent.shared_steps
    assert spent.gradient_evaluations == pytest.approx(spent.steps * (1 + 1.05) / 2)
    rows = {(r.contender, r.steps): r for r in summary.rows}
    whole = sum(2 * r.seconds for r in rows.values())
    assert spent.seconds == pytest.approx(whole * spent.steps / alone, rel=0.05)
    assert rows["sophia-g", 300].gradient_evaluations == pytest.approx(315), (
        "a budget's own cost is as if alone"
    )
    assert summary.evidence.linked is wsd
    assert {budget: noise.degrees for budget, noise in summary.noise.at.items()} == {300: 1, 600: 1}


def test_a_part_of_a_run_that_is_not_there_is_counted(tmp_path: Path) -> None:
    """If this fails deleting a trunk, or a record that claims one, makes a comparison look cheaper."""
    folder = write_comparison(tmp_path, Planted(wsd=True))
    result = folder / "runs" / run_name(("adamw", 600, 0)) / "result.json"
    result.unlink()
    assert summarise(folder).spent.shared_steps == 3 * 240
    short = folder / "runs" / run_name(("adamw", 300, 1)) / "result.json"
    content = json.loads(short.read_text())
    content["trunk"] |= {"steps": 1e9, "seconds": 1e9}
    short.write_text(json.dumps(content))
    spent = summarise(folder).spent
    assert spent.shared_steps == 2 * 240 + 300
    assert spent.seconds > 0


def test_a_step_costs_what_its_runs_say(tmp_path: Path) -> None:
    """If this fails the table of costs is not that of the records."""
    adamw, sophia = summarise(write_comparison(tmp_path)).costs
    assert (adamw.gradient_evaluations, sophia.gradient_evaluations) == (1.0, pytest.approx(1.05))
    assert adamw.relative is None
    assert sophia.relative.low <= 1.06 <= sophia.relative.high
    assert sophia.flops == pytest.approx(1.05 * adamw.flops)
    assert sophia.state_per_parameter == 8


def test_a_comparison_is_judged_from_its_folder(tmp_path: Path) -> None:
    """If this fails the sentence at the end of `sophia compare` is missing or wrong."""
    summary = summarise(write_comparison(tmp_path, Planted(efficiency={"adamw": 1.0, "sophia-g": 0.5})))
    (verdict,) = summary.verdicts
    assert verdict.word == "slower"
    assert verdict.sentence.startswith("sophia-g: loss ")
    assert ": slower than adamw. It needs " in verdict.sentence
    steps, evaluations = verdict.speedups[0].ratio, verdict.speedups[2].ratio
    assert evaluations.value == pytest.approx(steps.value / 1.05)
    assert verdict.half_budget.answer == "no"
    assert summary.complete
    assert summary.power.endswith("four times in five.")  # nothing is left to resolve
    assert [(r.contender, r.steps) for r in summary.rows][:2] == [("adamw", 300), ("adamw", 600)]


def test_seeds_are_proposed_for_the_difference_that_was_seen(tmp_path: Path) -> None:
    """Thousands of seeds for a difference that nobody saw, under two lines that are clearly apart."""
    told = []
    for name, seeds in (("few", (1, 2)), ("more", tuple(range(1, 40)))):
        planted = Planted(efficiency={"adamw": 1.0, "sophia-g": 0.97}, rest=0.02, seeds=seeds)
        told.append(summarise(write_comparison(tmp_path / name, planted)))
    few, more = told
    assert few.verdicts[0].word == "not distinguishable"
    found = re.search(r"one of ([\d.]+), the smallest .* would take (\d+) seeds \(--seeds \2\)", few.power)
    assert float(found[1]) == pytest.approx(abs(few.verdicts[0].difference.value), rel=0.1)
    assert 2 < int(found[2]) <= 50
    assert more.verdicts[0].word == "slower"
    assert "would take" not in more.power


@pytest.mark.parametrize(
    ("planted", "word", "words"),
    [
        (Planted(diverged=frozenset({("sophia-g", 600, 1)})), "unstable", "unstable (1 of 2 diverged)"),
        (
            Planted(diverged=frozenset({("sophia-g", 600, 0), ("sophia-g", 600, 1)})),
            "unstable",
            "unstable (2 of 2 diverged)",
        ),
        (
            Planted(diverged=frozenset({("adamw", 600, 1)})),
            "baseline unstable",
            "no verdict, because adamw is unstable (1 of 2 diverged)",
        ),
        (
            Planted(missing=frozenset({("sophia-g", 600, 0), ("sophia-g", 600, 1)})),
            "unfinished",
            "no verdict yet: no seed has finished at 600 steps",
        ),
        (
            Planted(seeds=(0, 1, 2), unfinished=frozenset({("sophia-g", 600, 1)})),
            "slower",
            "slower than adamw so far",
        ),
        (Planted(seeds=(0,)), "not distinguishable", "no interval from 1 seed"),
    ],
    ids=["one diverged", "all diverged", "baseline diverged", "missing", "unfinished", "one seed"],
)
def test_what_did_not_end_well_is_said(tmp_path: Path, planted: Planted, word: str, words: str) -> None:
    """If this fails a diverged or missing run is dropped in silence."""
    summary = summarise(write_comparison(tmp_path, planted))
    (verdict,) = summary.verdicts
    assert verdict.word == word
    assert words in verdict.sentence
    assert bool(summary.diverged) == bool(planted.diverged)
    assert summary.complete == (not planted.missing and not planted.unfinished)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"contenders": ["adamw", "<script>"]}, "contender '<script>'"),
        (
            {"runs": [{"contender": "adamw", "seed": 0, "steps": 600, "run": "../../etc"}]},
            "run '../../etc'",
        ),
        ({"baseline": "sgd"}, "baseline 'sgd'"),
        ({"seeds": list(range(9999))}, "at most 10,000"),
    ],
)
def test_records_that_cannot_be_used_are_refused_with_a_reason(tmp_path: Path, change, words) -> None:
    """If this fails a foreign folder can name paths of its choice, or is misread in silence."""
    write_comparison(tmp_path, **change)
    with pytest.raises(LabError) as caught:
        read_evidence(tmp_path)
    assert words in str(caught.value)


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    """If this fails a mistyped path gives an empty report."""
    with pytest.raises(LabError, match=r"no comparison\.json"):
        summarise(tmp_path)


def test_damaged_records_become_problems(tmp_path: Path) -> None:
    """If this fails one broken line hides a comparison, or is hidden."""
    write_comparison(tmp_path)
    runs = {
        (r["contender"], r["steps"], r["seed"]): tmp_path / "runs" / r["run"]
        for r in json.loads((tmp_path / "comparison.json").read_text())["runs"]
    }
    with (runs["adamw", 300, 0] / "log.jsonl").open("a") as log:
        log.write('[1, 2]\nnot json\n{"kind": "train", "st')
    (runs["adamw", 300, 1] / "result.json").write_text('{"status": "finished", "loss": NaN}')
    (runs["adamw", 600, 0] / "result.json").write_text("{")
    outside = tmp_path.parent / f"{tmp_path.name}-outside.json"
    outside.write_text('{"status": "finished", "loss": 0.1}')
    (runs["adamw", 600, 1] / "result.json").unlink()
    (runs["adamw", 600, 1] / "result.json").symlink_to(outside)
    evidence = read_evidence(tmp_path)
    for words in ("2 line(s)", "no finite number", "not JSON", "leads out of the folder"):
        assert any(words in problem for problem in evidence.problems), words
    status = {(r.contender, r.steps, r.seed): r.status for r in evidence.runs}
    assert status["adamw", 300, 1] == "diverged"
    assert status["adamw", 600, 1] == "unfinished"
