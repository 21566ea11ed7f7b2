"""The curves of a comparison as numbers for the page: each run's columns, thinned, smoothed, finite.

Evaluation rows may know their step alone; the other costs at that step are read off the training rows (they
are counted per step, and time is interpolated).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sophia.lab.analysis.read_records import Evidence, Row, Run, number
from sophia.lab.analysis.speedup import Curve
from sophia.lab.report.colours import Look

AXES = {
    "step": "steps",
    "gradient_evaluations": "gradient evaluations",
    "tokens": "tokens",
    "flops": "FLOPs",
    "seconds": "seconds",
}
"""What the horizontal axis can be: the key in the records, and the words."""

KNOWN = {
    "validation": "validation loss",
    "loss": "training loss, smoothed",
    "unclipped": "unclipped share",
    "eps_limited": "share limited by eps",
    "h_zero": "share with h = 0",
    "h_q05": "h, 5% quantile",
    "h_q50": "h, median",
    "h_q95": "h, 95% quantile",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "gradient_clipped": "share of clipped gradients",
    "B": "predictions B of a refresh",
    "age": "steps since h was renewed",
}
"""What the vertical axis can be; other numbers in the training rows follow under their own names."""

COUNTERS = {"kind", "cpu_seconds", *AXES}
MOST_POINTS = 300
MOST_METRICS = 24
SMOOTHING = 0.04
"""Width of the moving average of the training loss, as a share of the run."""


def page_data(evidence: Evidence, look: dict[str, Look], curve: Curve | None = None) -> dict[str, Any]:
    """Everything the page's scripts draw, as plain JSON values without NaN or infinity. ``curve`` is the
    baseline's, through its end losses.
    """
    metrics = _metrics(evidence)
    return {
        "baseline": evidence.baseline,
        "contenders": [
            {"name": c, "slot": look[c].slot, "shape": look[c].shape} for c in evidence.contenders
        ],
        "axes": AXES,
        "metrics": metrics,
        "target": evidence.target,
        "fit": None if curve is None else _fit(curve),
        "runs": [_run(run, evidence, metrics) for run in evidence.runs if run.train or run.evaluations],
    }


def _fit(curve: Curve) -> dict[str, Any]:
    steps = [float(d) for d in np.geomspace(curve.budgets[0], curve.budgets[-1], 60)]
    steps[0], steps[-1] = float(curve.budgets[0]), float(curve.budgets[-1])
    return {"x": [_short(d) for d in steps], "y": [_short(curve.loss(d)) for d in steps], "words": curve.kind}


def _metrics(evidence: Evidence) -> dict[str, str]:
    keys: dict[str, None] = {}
    for run in evidence.runs:
        for row in run.train[:1] + run.train[-1:]:
            keys |= dict.fromkeys(k for k, v in row.items() if number(v) is not None and k not in COUNTERS)
    known = {k: words for k, words in KNOWN.items() if k in keys or k == "validation"}
    other = {k[:60]: k[:60].replace("_", " ") for k in sorted(keys) if k not in KNOWN}
    return dict(list((known | other).items())[:MOST_METRICS])


def _run(run: Run, evidence: Evidence, metrics: dict[str, str]) -> dict[str, Any]:
    per_step = _flops_per_step(run, evidence)
    train = _thinned(run.train)
    smooth = _smoothed(run.train)
    columns: dict[str, Any] = {}
    for key in metrics:
        if key == "loss":
            columns[key] = [_short(smooth.get(id(row))) for row in train]
        elif key != "validation":
            values = [_short(number(row.get(key))) for row in train]
            columns[key] = values if any(v is not None for v in values) else None
    return {
        "contender": run.contender,
        "seed": run.seed,
        "steps": run.steps,
        "status": run.status,
        "end": _short(run.number("loss")) if run.status == "finished" else None,
        "validation": {
            "x": _positions(run.evaluations, run.train, per_step),
            "y": [_short(number(row.get("loss"))) for row in run.evaluations],
        },
        "train": {"x": _positions(train, run.train, per_step), "y": columns},
    }


def _positions(
    rows: Sequence[Row], known: Sequence[Row], per_step: float | None
) -> dict[str, list[float | None]]:
    """Where rows lie on each horizontal axis; a value a row lacks is interpolated in steps between training
    rows.
    """
    found: dict[str, list[float | None]] = {}
    steps = [number(row.get("step")) for row in rows]
    for key in AXES:
        points = [
            (s, v)
            for r in known
            if (s := number(r.get("step"))) is not None
            if (v := number(r.get(key))) is not None
        ]
        x, y = np.array([0.0, *(p[0] for p in points)]), np.array([0.0, *(p[1] for p in points)])
        column: list[float | None] = []
        for row, step in zip(rows, steps, strict=True):
            value = number(row.get(key))
            if value is None and step is not None:
                if key == "flops" and per_step is not None:
                    value = step * per_step
                elif points and step <= x[-1]:
                    value = float(np.interp(step, x, y))
            column.append(_short(value))
        found[key] = column
    return found


def _flops_per_step(run: Run, evidence: Evidence) -> float | None:
    """From the run's own result, else from another run of the contender: FLOPs a step are a count, not a
    measurement.
    """
    for other in (run, *(r for r in evidence.runs if r.contender == run.contender)):
        flops, steps = other.number("flops"), other.number("steps")
        if flops is not None and steps:
            return flops / steps
    return None


def _thinned(rows: Sequence[Row]) -> list[Row]:
    if len(rows) <= MOST_POINTS:
        return list(rows)
    return [rows[int(i)] for i in np.unique(np.linspace(0, len(rows) - 1, MOST_POINTS).round())]


def _smoothed(rows: Sequence[Row]) -> dict[int, float]:
    """Centred moving average of the training loss by row; it shortens towards both ends."""
    finite = [(id(row), loss) for row in rows if (loss := number(row.get("loss"))) is not None]
    half = int(SMOOTHING * len(finite) / 2)
    total = np.concatenate([[0.0], np.cumsum([loss for _, loss in finite])])
    smooth = {}
    for i, (key, _) in enumerate(finite):
        reach = min(half, i, len(finite) - 1 - i)
        smooth[key] = float((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1))
    return smooth


def _short(value: float | None) -> float | None:
    """Six digits: more than a screen shows, and a third of the bytes."""
    return None if value is None else float(f"{value:.6g}")
