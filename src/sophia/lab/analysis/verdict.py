"""Verdicts on contenders from the records of a comparison.

`summarise` reads the records and returns rows (contender x budget) and, for each contender, a verdict
against the baseline: the paired difference of end losses at the largest budget with its interval, the
speed-up at equal loss in every cost, and the paper's own test (arXiv 2305.14342, section 3: the baseline's
loss at half its budget). How the intervals are made stands in `seed_noise.py` and `speedup.py`. Each
contender's interval stands for itself: among ten contenders that all equal the baseline, one is expected to
be called different at the 90% level.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sophia.lab.analysis import made_by
from sophia.lab.analysis.cost_ratio import COSTS, cost_ratio, in_cost
from sophia.lab.analysis.read_records import Evidence, Run, read_evidence
from sophia.lab.analysis.seed_noise import (
    OWN_SEEDS,
    Estimate,
    NoiseByBudget,
    contrast,
    noise_by_budget,
    resolvable,
    seeds_needed,
)
from sophia.lab.analysis.speedup import Curve, Ratio, curve_of, speedup
from sophia.lab.analysis.steps_to_target import Reach, reach
from sophia.lab.analysis.totals import Row, Spent, StepCost, ends_of, spent, step_costs
from sophia.lab.analysis.verdict_words import (
    cost_sentence,
    half_budget_sentence,
    loss_sentence,
    power_sentence,
    steps_factor_sentence,
)

__all__ = ["CostSpeedup", "HalfBudget", "Row", "Summary", "Verdict", "judge", "summarise"]

_NO_SPEEDUP = ("unstable", "baseline unstable", "unfinished")


@dataclass(frozen=True)
class CostSpeedup:
    """The speed-up at equal loss in one cost."""

    cost: str
    """In words: "steps", "tokens", "gradient evaluations", "FLOPs" or "seconds"."""
    ratio: Ratio
    sentence: str

    @property
    def verdict(self) -> str:
        """The word: "faster", "slower" or "not distinguishable"."""
        return self.ratio.verdict


@dataclass(frozen=True)
class HalfBudget:
    """The paper's test: does the contender at half the budget reach the baseline's loss at the full
    budget?
    """

    answer: str
    """"yes", "no" or "not distinguishable"."""
    steps: int
    difference: Estimate
    """Contender at half the budget minus baseline at the full one, nats."""
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """One contender against the baseline, at the largest budget."""

    contender: str
    word: str
    """"faster", "slower", "not distinguishable", "unstable", "baseline unstable" or "unfinished"."""
    difference: Estimate | None
    """Paired difference of end losses, contender minus baseline, nats."""
    speedups: tuple[CostSpeedup, ...]
    half_budget: HalfBudget | None
    """None unless the contender was trained at half the largest budget."""
    sentence: str


@dataclass(frozen=True)
class Summary:
    """Results of a comparison: everything that the table and the report say."""

    evidence: Evidence
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]
    noise: NoiseByBudget
    curve: Curve | None
    curve_problem: str | None
    """Why there is no speed-up, if there is none."""
    costs: tuple[StepCost, ...]
    """What a step of each contender costs."""
    spent: Spent
    """What all runs together have cost."""
    reached: tuple[Reach, ...]
    """What each contender needs for the target of the protocol; empty without a target."""
    power: str
    """What these seeds can establish, and how many more would do for the smallest difference that was seen
    and is not established.
    """
    missing: tuple[str, ...]
    """A line for every contender and budget with runs that have no result."""
    diverged: tuple[str, ...]
    """A line for every contender and budget with diverged runs."""

    @property
    def complete(self) -> bool:
        """True if every planned run has ended, be it by divergence."""
        return not self.missing

    @property
    def notice(self) -> str:
        """Which runs were made by code whose numbers are not today's; empty if none was."""
        return made_by.notice(self.evidence.runs)

    @property
    def headline(self) -> str:
        """The verdict sentences, a line each."""
        return "\n".join(v.sentence for v in self.verdicts)


def summarise(folder: Path) -> Summary:
    """Read the comparison in `folder` and judge it; works for an unfinished one and says what is missing."""
    return judge(read_evidence(folder))


def judge(evidence: Evidence) -> Summary:
    """The summary of records that have been read."""
    # Noise is pooled over contenders, so each verdict rests on all finished runs of its budgets. A diverged
    # run has no end loss and is counted in the rows alone.
    ends = {(r.contender, r.steps, r.seed): loss for r in evidence.runs if (loss := _end_loss(r)) is not None}
    noise = noise_by_budget(ends, linked=evidence.linked)
    rows = ends_of(evidence)
    curve = curve_of(ends, evidence.baseline, noise)
    missing, diverged = _gaps(rows)
    verdicts = tuple(_verdict(evidence, ends, noise, curve, rows, c) for c in evidence.contenders[1:])
    return Summary(
        evidence=evidence,
        rows=rows,
        verdicts=verdicts,
        noise=noise,
        curve=curve if isinstance(curve, Curve) else None,
        curve_problem=curve if isinstance(curve, str) else None,
        costs=step_costs(evidence),
        spent=spent(evidence),
        reached=()
        if evidence.target is None
        else tuple(reach(rows, ends, c, evidence.target, noise) for c in evidence.contenders),
        power=_power(evidence, ends, noise, verdicts),
        missing=missing,
        diverged=diverged,
    )


def _end_loss(run: Run) -> float | None:
    return run.number("loss") if run.status == "finished" else None


def _verdict(
    evidence: Evidence,
    ends: dict[tuple[str, int, int], float],
    noise: NoiseByBudget,
    curve: Curve | str,
    rows: Iterable[Row],
    contender: str,
) -> Verdict:
    baseline, largest = evidence.baseline, max((r.steps for r in evidence.runs), default=0)
    at_end = {r.contender: r for r in rows if r.steps == largest}
    own, other = at_end.get(contender), at_end.get(baseline)
    difference = contrast(ends, {(contender, largest): 1.0, (baseline, largest): -1.0}, noise)
    word = {1: "slower", -1: "faster", 0: "not distinguishable"}[difference.sign if difference else 0]
    # In this order: a divergence outweighs what the other seeds say, the contender's own before the
    # baseline's, and only then does it matter that a pair of seeds is missing.
    if own is not None and own.diverged:
        word = "unstable"
    elif other is not None and other.diverged:
        word = "baseline unstable"
    elif difference is None:
        word = "unfinished"
    speedups: tuple[CostSpeedup, ...] = ()
    # A speed-up from the seeds that survived would speak for a contender that others cannot rely on.
    if word not in _NO_SPEEDUP and isinstance(curve, Curve):
        speedups = _speedups(evidence, ends, noise, curve, contender)
    sentence = loss_sentence(contender, baseline, word, difference, ends, largest, own, other)
    if speedups:
        sentence += " " + steps_factor_sentence(speedups[0].ratio, baseline)
    elif isinstance(curve, str) and word not in _NO_SPEEDUP:
        sentence += f" No speed-up: {curve}."
    return Verdict(
        contender,
        word,
        difference,
        speedups,
        _half_budget(evidence, ends, noise, contender, largest),
        sentence,
    )


def _speedups(
    evidence: Evidence,
    ends: dict[tuple[str, int, int], float],
    noise: NoiseByBudget,
    curve: Curve,
    contender: str,
) -> tuple[CostSpeedup, ...]:
    steps = speedup(ends, contender, evidence.baseline, curve, noise)
    if steps is None:
        return ()
    runs = {(r.contender, r.steps, r.seed): r for r in evidence.runs if r.status == "finished"}
    found = []
    for key, words in COSTS:
        # By the steps that were done, in pairs of one seed and budget: a slow hour of the machine slows both
        # members of a pair.
        pairs = []
        for (name, budget, seed), run in runs.items():
            partner = runs.get((evidence.baseline, budget, seed))
            if name == contender and partner is not None:
                done, partner_done = run.number("steps") or budget, partner.number("steps") or budget
                cost, partner_cost = run.number(key), partner.number(key)
                if key == "steps":
                    pairs.append((1.0, 1.0))
                elif cost is not None and partner_cost is not None:
                    pairs.append((partner_cost / partner_done, cost / done))
        exchange = cost_ratio(pairs)
        if exchange is not None:
            if len(pairs) == 1 and key != "seconds":  # a count, not a measurement: one pair says it exactly
                exchange = cost_ratio(pairs * 2)
                assert exchange is not None
            ratio = in_cost(steps, exchange)
            found.append(CostSpeedup(words, ratio, cost_sentence(contender, words, ratio)))
    return tuple(found)


def _half_budget(
    evidence: Evidence,
    ends: dict[tuple[str, int, int], float],
    noise: NoiseByBudget,
    contender: str,
    largest: int,
) -> HalfBudget | None:
    # Budgets are whole steps, so half of an odd one may be off by one; a hundredth is let pass.
    half = next((b for b in evidence.budgets if abs(2 * b - largest) <= 0.01 * largest), None)
    cells = ((contender, half), (evidence.baseline, largest))
    if half is None or any(r.status == "diverged" and (r.contender, r.steps) in cells for r in evidence.runs):
        return None
    estimate = contrast(ends, {(contender, half): 1.0, (evidence.baseline, largest): -1.0}, noise)
    if estimate is None:
        return None
    answer = {1: "no", -1: "yes", 0: "not distinguishable"}[estimate.sign]
    sentence = half_budget_sentence(contender, evidence.baseline, half, largest, answer, estimate)
    return HalfBudget(answer, half, estimate, sentence)


def _power(
    evidence: Evidence,
    ends: dict[tuple[str, int, int], float],
    noise: NoiseByBudget,
    verdicts: Iterable[Verdict],
) -> str:
    largest = max((b for _, b, _ in ends), default=0)
    seeds = sum((c, b) == (evidence.baseline, largest) for c, b, _ in ends)
    if seeds == 0 or noise.at[largest].degrees == 0:
        return power_sentence(seeds, None, None, None)
    here = noise.at[largest]
    # From five seeds on (`OWN_SEEDS`) an interval is made of a contender's own seeds, below that of the pool.
    degrees = float(here.degrees if seeds < OWN_SEEDS else seeds - 1)
    open_ = [
        abs(v.difference.value)
        for v in verdicts
        if v.word == "not distinguishable" and v.difference is not None and v.difference.value
    ]
    seen = min(open_, default=None)
    needed = None if seen is None else seeds_needed(here, seen, at_least=seeds)
    return power_sentence(seeds, resolvable(here, seeds, degrees), seen, needed)


def _gaps(rows: Iterable[Row]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    missing, diverged = [], []
    for row in rows:
        planned = row.finished + row.diverged + row.missing
        if row.missing:
            missing.append(
                f"{row.contender} at {row.steps:,} steps: {row.missing} of {planned} runs have no result yet"
            )
        if row.diverged:
            diverged.append(
                f"{row.contender} at {row.steps:,} steps: {row.diverged} of {planned} runs diverged"
            )
    return tuple(missing), tuple(diverged)
