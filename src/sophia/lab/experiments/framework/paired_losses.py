"""End losses of the variants of an experiment against one of them, over paired seeds."""

from __future__ import annotations

from collections.abc import Sequence

from sophia.lab.analysis.seed_noise import Estimate, contrast, noise_by_budget
from sophia.lab.experiments.framework.records import Row

__all__ = ["loss_differences"]


def loss_differences(rows: Sequence[Row], key: str, base: str) -> dict[str, Estimate | None]:
    """End loss of each variant minus that of ``base``, with a 90% interval; None where a run diverged.

    ``key`` is the name of the variant in a row's case. The noise is pooled over all rows.
    """
    lost = {row.case[key] for row in rows if row.result["loss"] is None}
    ends = {
        (row.case[key], 0, row.case["seed"]): float(row.result["loss"])
        for row in rows
        if row.case[key] not in lost
    }
    noise = noise_by_budget(ends)
    names = dict.fromkeys(row.case[key] for row in rows)
    return {
        name: None if {name, base} & lost else contrast(ends, {(name, 0): 1.0, (base, 0): -1.0}, noise)
        for name in names
        if name != base
    }
