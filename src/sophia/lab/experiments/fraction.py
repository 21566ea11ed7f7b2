"""How much of the batch a refresh needs: noise of an estimate against its cost, and what the loss says.

The noise of an estimate is the standard deviation of a coordinate over draws in units of its mean: the step
divides by h coordinate by coordinate. A group of parameters is spoken for by the median of its coordinates;
norms over all of them would be those of a few rows of the text. A draw takes fresh rows and fresh labels, at
weights that some training has made.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sophia.lab.config.run import Data, Run
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.data.tokens import Tokens
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.paired_losses import loss_differences
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.models import build
from sophia.lab.optimizers import table
from sophia.lab.protocols import protocol_file
from sophia.lab.training.loop import Progress as Trained
from sophia.lab.training.loop import train
from sophia.likelihoods import Categorical
from sophia.refresh.seeds import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BASE", "EXPERIMENT", "GROUPS"]

CONTENDER = "sophia-g"
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
PAIRS = (0, 1, 4)
"""Pairs of labels a prediction; 0 is one label, Algorithm 2 to the letter."""
GROUPS = ("embedding and head", "hidden matrices", "vectors")
BASE = "1/2, k = 10"
WAYS: Mapping[str, dict[str, float | int]] = {
    BASE: {"fraction": 1 / 2, "update_every": 10},
    "1/8, k = 10": {"fraction": 1 / 8, "update_every": 10},
    "1/16, k = 10": {"fraction": 1 / 16, "update_every": 10},
    "1/4, k = 10": {"fraction": 1 / 4, "update_every": 10},
    "1, k = 10": {"fraction": 1.0, "update_every": 10},
    "1/16, k = 5": {"fraction": 1 / 16, "update_every": 5},
    "1/2, k = 40": {"fraction": 1 / 2, "update_every": 40},
}
"""The last two cost what 1/8, k = 10 costs; h then remembers as many steps as with k = 10."""
SEEDS = (1, 2, 3)
STEPS = 400
WARM = 100
"""Steps before the noise is measured."""


def _config(data: Data, steps: int, *, seed: int, quick: bool, way: Mapping[str, Any]) -> Run:
    protocol = protocol_file.chosen("tiny" if quick else "quick", None)
    tuned = table.find(CONTENDER).settings(protocol.contenders[CONTENDER].settings)
    over = {**way, "beta2": float(tuned["beta2"]) ** (way["update_every"] / 10)}
    return protocol.run(CONTENDER, data=data, seed=seed, steps=steps, over=over)


def run(quick: bool, records: Records, progress: Progress) -> None:
    """The noise first, then the training runs, those that decide before the others."""
    text = corpus.load("sotu")
    ids, data = tokens.encode(text), Data(text.name, text.sha256, vocabulary.SHA256)
    steps, seeds, draws = (6, (1, 2), 3) if quick else (STEPS, SEEDS, 200)
    cases = [{"part": "noise", "fraction": f, "pairs": p} for f in FRACTIONS for p in PAIRS]
    model: nn.Module | None = None
    for case in records.left(cases, progress):
        config = _config(data, steps, seed=1, quick=quick, way=WAYS[BASE])
        if model is None:
            model = _warm(config, ids, 3 if quick else WARM)
        records.add(case, draws=draws, **_noise(model, config, ids, case, draws))
    cases = [{"part": "loss", "way": name, "seed": s} for name in WAYS for s in seeds]
    for case in records.left(cases, progress):
        config = _config(data, steps, seed=case["seed"], quick=quick, way=WAYS[case["way"]])

        def report(trained: Trained) -> None:
            progress.within(trained.step / steps)

        with tempfile.TemporaryDirectory() as folder:
            end = train(config, Path(folder), ids, save_every=steps, stop=progress.stop, report=report)
        records.add(
            case,
            steps=steps,
            status=end["status"],
            loss=end["loss"],
            unclipped=end["unclipped"],
            cpu_seconds=end["cpu_seconds"],
        )


def _warm(config: Run, ids: Tokens, steps: int) -> nn.Module:
    model = build.build(config.model, seed=1)
    row = table.find(CONTENDER)
    optimizer = row.build(model, row.settings(config.optimizer.settings), 1)
    for step in range(steps):
        batch = ids.batch(seed=1, step=step, size=config.batch, context=config.model.context)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()  # type: ignore[attr-defined]
    return model


def _groups(model: nn.Module) -> dict[str, list[Tensor]]:
    """The parameters, by ``GROUPS``."""
    found: dict[str, list[Tensor]] = {name: [] for name in GROUPS}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            found["vectors"].append(p)
        else:
            found["hidden matrices" if ".h." in name else "embedding and head"].append(p)
    return found


def _noise(
    model: nn.Module, config: Run, ids: Tokens, case: Mapping[str, Any], draws: int
) -> dict[str, float]:
    """Noise of one estimate, by group."""
    likelihood, groups = Categorical(pairs=case["pairs"]), _groups(model)
    rows = max(1, int(case["fraction"] * config.batch))
    labels = generator(torch.device("cpu"), "fraction", case["pairs"], rows)
    first = {name: [torch.zeros_like(p) for p in those] for name, those in groups.items()}
    second = {name: [torch.zeros_like(p) for p in those] for name, those in groups.items()}
    for draw in range(draws):
        batch = ids.batch(seed=2, step=draw, size=rows, context=config.model.context)
        logits = model(input_ids=batch).logits[:, :-1]
        mask = torch.ones(logits.shape[:-1], dtype=torch.bool)
        logits.backward(likelihood.sampled_gradient(logits, mask, labels, scale=mask.numel() ** -0.5))
        for name, those in groups.items():
            for one, two, p in zip(first[name], second[name], those, strict=True):
                assert p.grad is not None
                h, p.grad = p.grad.square(), None
                one.add_(h)
                two.addcmul_(h, h)
    return {
        name: float(_relative_deviation(_flat(first[name]), _flat(second[name]), draws).median())
        for name in groups
    }


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).double()


def _relative_deviation(first: Tensor, second: Tensor, draws: int) -> Tensor:
    """Standard deviation over mean of each coordinate that was not always zero, from sums of powers."""
    mean = (first / draws)[first > 0]
    variance = ((second / draws)[first > 0] - mean.square()) * draws / (draws - 1)
    return variance.clamp_(min=0).sqrt_() / mean


def _of(records: Records, group: str, fraction: float, pairs: int) -> float:
    (row,) = records.where(part="noise", fraction=fraction, pairs=pairs)
    value = row.result[group]
    return math.nan if value is None else float(value)


def verdict(records: Records) -> Verdict:
    """Whether an eighth, and a sixteenth, of the batch trains as well as the half."""
    found = loss_differences(records.where(part="loss"), "way", BASE)
    losses = [row.result["loss"] for row in records.where(part="loss", way=BASE)]
    base = fmean(loss for loss in losses if loss is not None) if any(losses) else math.nan

    def words(name: str) -> str:
        e = found[name]
        if e is None:
            return f"{name} diverged"
        interval = "" if e.low is None else f" ({e.low:+.3f} to {e.high:+.3f})"
        return f"{name} {e.value:+.3f}{interval}"

    noise = "; ".join(
        f"{group} {_of(records, group, 1 / 2, 0):.2f} with one label at a half, with pairs "
        f"{_of(records, group, 1 / 2, 4):.2f} at a half and {_of(records, group, 1 / 8, 4):.2f} at an eighth"
        for group in GROUPS
    )
    sentence = (
        f"End loss against {BASE} ({base:.3f} nats a token), 90% intervals: "
        f"{', '.join(words(name) for name in found)}. Noise of one estimate: {noise}."
    )
    signs = {name: 1 if e is None else e.sign for name, e in found.items()}
    if signs["1/8, k = 10"] <= 0 and signs["1/16, k = 10"] <= 0:
        return Verdict("holds", sentence)
    return Verdict("holds in part" if signs["1/8, k = 10"] <= 0 else "contradicted", sentence)


def draw(records: Records) -> Figure:
    """Left: noise by fraction. Right: end losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(GROUPS, ("#0072b2", "#d55e00", "#009e73"), strict=True))
    measured = [f for f in FRACTIONS if len(records.where(part="noise", fraction=f)) == len(PAIRS)]
    for group, colour in colours.items():
        for pairs, style in ((0, ":"), (4, "-")):
            noise = [_of(records, group, f, pairs) for f in measured]
            left.plot(measured, noise, style, color=colour, marker="o", ms=4)
        left.plot([], [], color=colour, marker="o", ms=4, label=group)
    left.set_xscale("log", base=2)
    left.set_xticks(FRACTIONS, [_share(f) for f in FRACTIONS])
    left.axhline(math.sqrt(2), color="#999999", lw=0.8)
    left.set_ylim(bottom=0)
    left.set(xlabel="fraction of the batch, which is the cost")
    left.legend(frameon=False, fontsize=9)
    left.set_title(
        "Noise of one estimate (solid: four pairs of labels, dotted: one label)", loc="left", fontsize=10
    )
    found = loss_differences(records.where(part="loss"), "way", BASE)
    for place, e in enumerate(found.values()):
        if e is None:
            right.text(0, place, " diverged", va="center", fontsize=9)
            continue
        colour = {1: "#d55e00", -1: "#009e73", 0: "#6b6b6b"}[e.sign]
        low, high = (e.value, e.value) if e.low is None or e.high is None else (e.low, e.high)
        right.plot([low, high], [place, place], color=colour, lw=1.6)
        right.plot(e.value, place, "o", color=colour, ms=5)
    right.axvline(0, color="#999999", lw=0.8)
    right.set_yticks(range(len(found)), list(found))
    right.invert_yaxis()
    right.grid(False, axis="y")
    right.set_title(f"End loss against {BASE}, nats a token, 90% intervals", loc="left", fontsize=10)
    return figure


def _share(fraction: float) -> str:
    return "1" if fraction == 1 else f"1/{round(1 / fraction)}"


EXPERIMENT = Experiment(
    name="fraction",
    title="how much of the batch a refresh needs",
    claims=(3,),
    claim=(
        "A part of the batch is enough for the Hessian: the paper takes 240 of 480 sequences for "
        "Gauss-Newton-Bartlett and 32 of 480 for Hutchinson (section 3.1). Ours: a sixteenth or an eighth is "
        "enough for Gauss-Newton-Bartlett too."
    ),
    scale=(
        "The quick preset: GPT-2 of 0.7M parameters, 16 x 64 tokens a step, 400 steps, settings tuned at a "
        "half; beta2 0.8, so h averages five refreshes only, where noise shows most. Three seeds. The noise "
        f"is measured after {WARM} steps, 200 draws each."
    ),
    expected=(
        "One estimate has noise sqrt(2) at any fraction, as the square of a nearly normal number; fewer "
        "rows add the spread between rows, most in embeddings of rare tokens; pairs of labels take away what "
        "the rarity of labels adds. So cost falls faster than noise grows, and losses are equal."
    ),
    runtime="about 20 minutes on one core; quick 10 s",
    figure=(
        "Left: noise of one estimate by fraction, median over coordinates; the line is sqrt(2). Right: end "
        "losses against half of the batch every ten steps (orange: worse, green: better, grey: not "
        "established); the last two cost what an eighth every ten steps costs."
    ),
    record="Noise of one estimate by fraction, pairs and group of parameters; or the end of a training run.",
    run=run,
    draw=draw,
    verdict=verdict,
    parts=("gnb", "gnb_single", "paper"),
)
