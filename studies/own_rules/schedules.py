"""Does warm-up-stable-decay order the contenders as a cosine does? From the records of two comparisons.

    python studies/own_rules/schedules.py results/comparisons/schedule-cosine results/comparisons/schedule-wsd

The two must share contenders, seeds and budgets, and differ in the schedule alone. Each contender under each
schedule is a cell of its own, and runs of one seed are paired: they start from the same weights and read the
same batches under both. Intervals are those of ``sophia.lab.analysis.seed_noise`` with budgets taken as
dependent, since half of them share their first part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sophia.lab.analysis.read_records import Evidence, read_evidence
from sophia.lab.analysis.seed_noise import LEVEL, Estimate, Weights, contrast, pooled_noise

Ends = dict[tuple[str, int, int], float]


def ends_of(evidence: Evidence, schedule: str) -> Ends:
    """End losses of finished runs; a contender's name gets its schedule behind it."""
    return {
        (f"{run.contender}/{schedule}", run.steps, run.seed): loss
        for run in evidence.runs
        if run.status == "finished" and (loss := run.number("loss")) is not None
    }


def words(estimate: Estimate | None) -> str:
    """A difference with its interval."""
    if estimate is None:
        return "no seed has finished under both"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.3f} (no interval)"
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f}), {estimate.seeds} seeds"


def order(estimate: Estimate | None) -> str:
    """Which of two is ahead, if that is established."""
    sign = 0 if estimate is None else estimate.sign
    return {1: "behind", -1: "ahead", 0: "not distinguishable"}[sign]


def main() -> None:
    """Print the three tables: schedules, contenders, and whether the contenders' difference depends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cosine", type=Path)
    parser.add_argument("wsd", type=Path)
    arguments = parser.parse_args()
    one, other = read_evidence(arguments.cosine), read_evidence(arguments.wsd)
    if (one.contenders, one.budgets, one.seeds) != (other.contenders, other.budgets, other.seeds):
        raise SystemExit(
            "The two comparisons differ in contenders, budgets or seeds, so their runs make no pairs. Give "
            "two that differ in the schedule alone."
        )
    ends = ends_of(one, "cosine") | ends_of(other, "wsd")
    noise = pooled_noise(ends, linked=True)

    def of(weights: Weights) -> Estimate | None:
        return contrast(ends, weights, noise)

    print(f"End loss under wsd minus under the cosine, nats, {LEVEL:.0%} intervals")
    for name in one.contenders:
        for budget in one.budgets:
            gap = of({(f"{name}/wsd", budget): 1.0, (f"{name}/cosine", budget): -1.0})
            print(f"  {name:10} {budget:>5} steps  {words(gap)}")
    for name in one.contenders[1:]:
        print(f"{name} minus {one.baseline}")
        for budget in one.budgets:
            gaps = {
                schedule: of(
                    {(f"{name}/{schedule}", budget): 1.0, (f"{one.baseline}/{schedule}", budget): -1.0}
                )
                for schedule in ("cosine", "wsd")
            }
            for schedule, gap in gaps.items():
                print(f"  {budget:>5} steps, {schedule:6}  {words(gap)}: {order(gap)}")
            depends = of(
                {
                    (f"{name}/wsd", budget): 1.0,
                    (f"{one.baseline}/wsd", budget): -1.0,
                    (f"{name}/cosine", budget): -1.0,
                    (f"{one.baseline}/cosine", budget): 1.0,
                }
            )
            print(f"  {budget:>5} steps, wsd less cosine  {words(depends)}")


if __name__ == "__main__":
    main()
