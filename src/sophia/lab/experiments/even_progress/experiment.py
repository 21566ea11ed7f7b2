"""How the decrease of the loss is spread over sharp and flat dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from statistics import mean
from typing import Any

import torch

from sophia.lab.config.run import Setting
from sophia.lab.experiments import toy_landscape
from sophia.lab.experiments.condition_number import descents
from sophia.lab.experiments.condition_number.convex_problems import Valley, spectrum
from sophia.lab.experiments.even_progress import allocation
from sophia.lab.experiments.even_progress.figure import draw
from sophia.lab.experiments.framework import small_language_model
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Case, Records
from sophia.lab.models import build

__all__ = ["EXPERIMENT"]

D, KAPPA, STEPS = 24, 1e4, 300
_SOPHIA: list[dict[str, float]] = [
    {"lr": lr, "rate": rate} for lr in descents.rates(-4, 0, 25) for rate in (0.001, 0.003, 0.01, 0.03, 0.1)
]
QUADRATIC: dict[str, list[dict[str, float]]] = {
    "gradient descent": [
        {"lr": lr} for lr in (0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 1.3, 1.6, 1.8, 1.9, 1.97)
    ],
    "SignGD": [{"lr": lr} for lr in descents.rates(-5, 0, 61)],
    "AdamW": [{"lr": lr} for lr in descents.rates(-5, 0, 61)],
    "Sophia": _SOPHIA,
    "Sophia, Rademacher": _SOPHIA,
}
"""The settings among which each method's best is taken. The paper's probe is Gaussian."""
STARTS = (("equal loss", None), ("equal distance", None), ("equal loss", 1))
"""With the gradient noise: none, or that of a single prediction, which hides the gradient. Dimensions that
start with less loss than the noise will put there have none to lose, hence no fourth.
"""
TOY_STEPS = 20
GPT: Mapping[str, tuple[str, dict[str, Setting], float]] = {
    # All with the same momentum and no decay, so that they differ in the pre-conditioner alone; the middle of
    # the step sizes that are tried is the preset's where it has one.
    "gradient descent": ("sgd", {"momentum": 0.8, "weight_decay": 0.0}, 0.3),
    "SignGD": ("signum", {"beta": 0.8, "weight_decay": 0.0}, 1.5e-3),
    "AdamW": ("adamw", {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.0}, 5.07e-3),
    "Sophia": ("sophia-g", {"beta1": 0.8, "beta2": 0.8, "gamma": 0.0202, "weight_decay": 0.0}, 1.49e-3),
}
FACTORS = (0.5, 1.0, 2.0)
GPT_STEPS, SEEDS = 40, (1, 2, 3)


def run(quick: bool, records: Records, progress: Progress) -> None:
    """The quadratic, the toy, a search of step sizes for the GPT, and its allocations with the best."""
    steps, seeds = (6, (1,)) if quick else (GPT_STEPS, SEEDS)
    factors = (0.5, 1.0) if quick else FACTORS
    cases: list[dict[str, Any]] = [
        {"part": "quadratic", "start": start, "predictions": predictions, "method": method}
        for (start, predictions), method in product(STARTS, QUADRATIC)
    ]
    cases += [{"part": "toy", "method": method} for method in toy_landscape.METHODS]
    cases += [{"part": "search", "method": m, "factor": f} for m, f in product(GPT, factors)]
    cases += [{"part": "allocation", "method": m, "seed": seed} for m, seed in product(GPT, seeds)]
    for case in records.left(cases, progress):
        if case["part"] == "quadratic":
            records.add(case, **_quadratic(case, quick))
        elif case["part"] == "toy":
            records.add(case, **_toy(case["method"], quick))
        else:
            contender, settings, lr = GPT[case["method"]]
            if case["part"] == "search":
                factor = case["factor"]
                records.add(case, loss=_search(contender, {**settings, "lr": factor * lr}, steps, quick))
                continue
            tried = records.where(part="search", method=case["method"])
            best = min(tried, key=lambda row: row.result["loss"] or float("inf")).case["factor"]
            found = allocation.allocate(
                contender,
                {**settings, "lr": best * lr},
                steps=steps,
                window=max(1, steps // 4),
                draws=2 if quick else 4,
                seed=case["seed"],
                quick=quick,
                progress=progress,
            )
            records.add(case, lr=best * lr, factor=best, **found)


def _quadratic(case: Case, quick: bool) -> dict[str, Any]:
    """The loss of each dimension with the setting whose loss is lowest over the last tenth of the steps."""
    eigenvalues, steps = spectrum(D, KAPPA), 40 if quick else STEPS
    valley = Valley("quadratic", eigenvalues, torch.eye(D, dtype=torch.float64))
    repeats = 1 if case["predictions"] is None else 32
    if case["start"] == "equal loss":
        start = valley.start(torch.full((repeats, D), 1 / D, dtype=torch.float64), 1.0)
    else:
        start = torch.full((repeats, D), float((2 / eigenvalues.sum()).sqrt()), dtype=torch.float64)
    settings = QUADRATIC[case["method"]][:: 9 if quick else 1]
    losses = descents.losses_by_dimension(
        case["method"], valley, start, steps, predictions=case["predictions"], settings=settings
    )
    end = losses[-steps // 10 :].mean(0)  # (settings, D); one point of an oscillation says little
    best = int(end.sum(-1).nan_to_num(torch.inf).argmin())
    return {
        "settings": settings[best],
        "eigenvalues": eigenvalues.tolist(),
        "left": (end[best] / losses[0, best]).tolist(),
        "left_in_all": float(end[best].sum() / losses[0, best].sum()),
    }


def _toy(method: str, quick: bool) -> dict[str, Any]:
    """Both dimensions in the median over starts, with the step size that gets lowest in the median: from one
    start alone, a step size that hits the minimum by luck would be chosen.
    """
    start = toy_landscape.starts(5 if quick else 100, 0.0, 0.596, seed=1)
    rates = [1.0] if method == "Newton" else [round(1.03 * 10 ** (e / 12), 6) for e in range(-30, 4)]
    found = {}
    for lr in rates:
        losses = toy_landscape.parts(toy_landscape.trajectory(method, lr, start, TOY_STEPS))
        found[lr] = losses.nan_to_num(torch.inf)  # (steps + 1, starts, 2)
    best = min(rates, key=lambda lr: float(found[lr][-1].sum(-1).median()))
    return {"lr": best, "losses": found[best].median(1).values.tolist()}


def _search(contender: str, settings: Mapping[str, Setting], steps: int, quick: bool) -> float | None:
    """Held-out loss at the end of a run with a seed that is not used again; None if it did not get there."""
    shape, source = small_language_model.shape(quick), small_language_model.text(quick)
    model = build.gpt2(shape, seed=0)
    done = 0
    for done in small_language_model.training(  # noqa: B007
        model,
        contender,
        settings,
        source,
        steps=steps,
        batch=4 if quick else 16,
        context=shape.context,
        seed=0,
    ):
        pass
    ids, _ = source.held_out(sequences=4 if quick else 8, context=shape.context)
    with torch.no_grad():
        loss = float(model.eval()(input_ids=ids, labels=ids).loss)
    return loss if done == steps and loss == loss else None


def _ends(records: Records, method: str, start: str, predictions: int | None) -> tuple[float, float]:
    """What the dimension furthest behind has left of its loss, and what the one furthest ahead has."""
    (row,) = records.where(part="quadratic", method=method, start=start, predictions=predictions)
    return float(max(row.result["left"])), float(min(row.result["left"]))


def flattest_half(decrease: list[float]) -> float:
    """Share of the decrease that came through the flatter half of the coordinates."""
    return sum(decrease[: len(decrease) // 2]) / sum(decrease)


def move_ratio(distance: list[float]) -> float:
    """How far the sharpest tenth moves in a step, over the flattest."""
    return distance[-1] / distance[0]


def _gpt(records: Records, method: str) -> tuple[list[float], list[float]]:
    rows = [row.result for row in records.where(part="allocation", method=method)]
    return [flattest_half(r["decrease"]) for r in rows], [move_ratio(r["distance_a_step"]) for r in rows]


def verdict(records: Records) -> Verdict:
    """No dimension is left behind where Adam's leaves some; in the GPT by the share of the flatter half."""
    methods = [m for m in QUADRATIC if m != "Sophia, Rademacher"]
    quiet = {m: max(_ends(records, m, start, None)[0] for start, n in STARTS if n is None) for m in methods}
    noisy = {m: _ends(records, m, "equal loss", 1)[0] for m in methods}
    toy = {
        row.case["method"]: max(
            end / begin for begin, end in zip(row.result["losses"][0], row.result["losses"][-1], strict=True)
        )
        for row in records.where(part="toy")
    }
    gpt = {m: _gpt(records, m) for m in GPT}
    separable = [left["Sophia"] == min(left.values()) for left in (quiet, noisy, toy)]
    # Paired by seed: the same weights, batches and held-out sequences.
    more = [s > a for s, a in zip(gpt["Sophia"][0], gpt["AdamW"][0], strict=True)]
    harder = [s < a for s, a in zip(gpt["Sophia"][1], gpt["AdamW"][1], strict=True)]
    sentence = (
        f"What the dimension furthest behind has left of its loss: on a quadratic of condition number "
        f"{KAPPA:.0e} after {STEPS} steps without noise {_listed(quiet)}; with noise that hides the gradient "
        f"{_listed(noisy)}; on the toy after {TOY_STEPS} steps {_listed(toy)}. In the GPT the flatter half "
        f"of the coordinates carries {', '.join(f'{mean(v[0]):.0%} ({m})' for m, v in gpt.items())} of the "
        f"decrease of the loss (Sophia above AdamW in {sum(more)} of {len(more)} seeds), and the sharpest "
        f"tenth moves {', '.join(f'{mean(v[1]):.2f} ({m})' for m, v in gpt.items())} times as far in a "
        f"step as the flattest (Sophia below AdamW in {sum(harder)} of {len(harder)} seeds)."
    )
    if edges := _at_edge(records):
        sentence += f" Best step sizes at the edge of those tried in the GPT: {', '.join(edges)}."
    if all(separable) and all(more) and all(harder):
        return Verdict("holds", sentence)
    return Verdict("holds in part" if any(separable) or all(harder) else "contradicted", sentence)


def _at_edge(records: Records) -> list[str]:
    """Methods whose chosen step size is an outermost of those tried: a better one may lie beyond."""
    factors = records.values("factor")
    chosen = {row.case["method"]: row.result.get("factor") for row in records.where(part="allocation")}
    return [m for m, factor in chosen.items() if factor in (min(factors), max(factors))]


def _listed(left: Mapping[str, float]) -> str:
    return ", ".join(f"{m} {_share(value)}" for m, value in left.items())


def _share(value: float) -> str:
    """A share in words.

    >>> _share(0.34), _share(0.0021), _share(0.0)
    ('34%', '2.1e-03', 'nothing')
    """
    if value < 1e-12:
        return "nothing"
    return f"{value:.1e}" if value < 0.01 else f"{value:.0%}"


EXPERIMENT = Experiment(
    name="even-progress",
    title="how the decrease of the loss is spread over sharp and flat dimensions",
    claims=(2,),
    claim=(
        "By dividing by the curvature and clipping each coordinate, Sophia penalises sharp dimensions more "
        "than Adam does and so makes the loss decrease evenly in all dimensions (introduction and section "
        "2.1)."
    ),
    scale=(
        f"A quadratic of {D} dimensions and condition number {KAPPA:.0e} from two starts, the paper's toy, "
        f"and a GPT of 0.7M parameters over {GPT_STEPS} steps of 1,024 tokens with {len(SEEDS)} seeds, "
        "where the change of the held-out loss is allocated to coordinates in tenths of their curvature. "
        "Each method with its best step size; in the GPT all with momentum 0.8, no decay. The paper shows "
        "the toy only."
    ),
    expected=(
        "On the quadratic and the toy Sophia leaves no dimension behind, gradient descent the flat ones; "
        "Adam, whose step is a gradient over its own noise, the flat ones where noise is large. In the GPT "
        "Sophia moves sharp coordinates less than Adam; whether more of the decrease comes from flat ones "
        "is open, as most steps are clipped at this batch size."
    ),
    runtime="about 5 minutes on one core; quick 10 s",
    figure=(
        "Above: what each dimension of the quadratic has left of its loss (solid: start with equal losses, "
        "dashed: equal distances), without noise and with noise that hides the gradient; the two "
        "dimensions of the toy. Below: the share of the GPT's decrease by tenth of the curvature, how far "
        "each tenth moves in a step relative to the flattest (thin lines are seeds), and the search of the "
        "step sizes."
    ),
    record=(
        "Quadratic and toy: the loss of each dimension. Search: the loss of a step size. Allocation: "
        "decrease, distance moved and curvature by tenth, and how well the parts add up."
    ),
    run=run,
    draw=draw,
    verdict=verdict,
    parts=("gnb", "gnb_single", "hutchinson", "paper"),
)
