"""What the rules do inside: shares of coordinates, sizes of steps, noise, rare tokens; by kind of tensor.

    python studies/own_rules/inside_the_rules.py PROTOCOL.toml OUT.jsonl [STEPS]   # 3 minutes on one core
    python studies/own_rules/inside_the_rules.py --draw OUT.jsonl PICTURE.png

Trains each contender below with the settings of the protocol on its first seed, and writes

kind "step", every ten steps, for every kind of tensor:
    clipped, floor, free: shares of coordinates whose step is lr; is decided by the floor of the denominator
        (eps, or damping rms(u)); is decided by the curvature. None where the rule does not go by coordinates.
    size: rms of the step, decay aside, in units of lr.
    m_noise: rms of m over rms of sqrt(h / B). Were the gradient pure noise of the variance that the model's
        own labels have, this would be sqrt((1 - beta1) / (1 + beta1)).
    absent: of the token table, the part of the squared step that goes to rows of tokens that no batch of the
        last ten steps held, over their part of the rows.
kind "noise", at three points: the noise scale tr(Sigma) / |G|^2 in tokens (McCandlish et al. 2018), from 32
    batches of the protocol's size at fixed weights, both parts unbiased; None where no signal is seen.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophia import Sophia
from sophia.lab.config import schedules
from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.models import build
from sophia.lab.optimizers import table
from sophia.lab.protocols import protocol_file as protocol_files
from sophia.step.hidden_matrices import hidden_matrices
from sophia.update_rule import corrected_gamma, look_ahead, rms

CONTENDERS = ("adamw", "sophia-g", "sophia-damped", "sophia-spectral")
EVERY, BATCHES = 10, 32


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The kind of each parameter, by name."""
    hidden = hidden_matrices(model)

    def kind(name: str, p: Tensor) -> str:
        if id(p) in hidden:
            return "attention" if ".attn." in name else "MLP"
        return "tokens" if "wte" in name else "positions" if "wpe" in name else "vectors"

    return {name: kind(name, p) for name, p in model.named_parameters()}


def shares(
    group: dict[str, Any], m: Tensor, g: Tensor, h: Tensor | None
) -> tuple[float, float, float] | None:
    """Counts of clipped, floor-limited and free coordinates in the step that was just taken; None where the
    rule has no h.
    """
    if h is None:
        return None
    rule, beta1 = group["rule"], float(group["betas"][0])
    if rule == "paper":
        u, gamma, floor = m, float(group["gamma"]), float(group["eps"])
    else:
        u = look_ahead(m, g, beta1=beta1)
        taken = group["step"] - group["joined"]
        gamma = corrected_gamma(
            float(group["gamma"]), betas=group["betas"], step=taken, refreshes=group["refreshes"]
        )
        # The rule takes the rms of the step before; this one's is within a few per cent of it.
        floor = max(group["damping"] * float(rms(u)), float(group["eps"]))
    clipped = u.abs() >= (gamma * h).clamp(min=floor)
    low = gamma * h <= floor
    return float(clipped.sum()), float((low & ~clipped).sum()), float((~low & ~clipped).sum())


def measured(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    kinds: dict[str, str],
    before: dict[str, Tensor],
    absent: Tensor,
) -> Iterator[dict[str, Any]]:
    """A row for each kind of tensor, after a step whose gradients are still there."""
    home = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for kind in dict.fromkeys(kinds.values()):
        counts, squares, m_squares, noise, size = [0.0, 0.0, 0.0], 0.0, 0.0, 0.0, 0
        rare, whole = None, isinstance(optimizer, Sophia)
        for name, p in model.named_parameters():
            if kinds[name] != kind:
                continue
            group, grad = home[id(p)], p.grad
            assert grad is not None
            decay = group["lr"] * group["weight_decay"]
            step = (p.detach() - before[name] * (1 - decay)) / group["lr"]
            squares, size = squares + float(step.square().sum()), size + p.numel()
            if kind == "tokens" and 0 < int(absent.sum()) < len(absent):
                rows = step.square().sum(1)
                rare = float(rows[absent].sum() / rows.sum()) / float(absent.float().mean())
            if isinstance(optimizer, Sophia):
                m, h = optimizer.state[p]["exp_avg"], optimizer.state[p].get("hessian")
                found = shares(group, m, grad, h)
                whole = whole and found is not None
                counts = [a + b for a, b in zip(counts, found or (0.0, 0.0, 0.0), strict=True)]
                correction = 1 - float(group["betas"][1]) ** group["refreshes"] or 1.0
                m_squares += float(m.square().sum())
                noise += 0.0 if h is None else float(h.clamp(min=0).sum()) / correction
        names = ("clipped", "floor", "free")
        row: dict[str, Any] = {"tensors": kind, "size": math.sqrt(squares / size), "absent": rare}
        row |= {name: count / size if whole else None for name, count in zip(names, counts, strict=True)}
        yield row | {"m_squares": m_squares, "h_sum": noise}


def noise_scale(
    model: nn.Module, kinds: dict[str, str], ids: Any, config: Any, seed: int
) -> dict[str, float | None]:
    """The noise scale of each kind of tensor, tokens."""
    sums: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    squares: dict[str, float] = dict.fromkeys(kinds.values(), 0.0)
    for number in range(BATCHES):
        batch = ids.batch(seed=seed, step=number, size=config.batch, context=config.model.context)
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            sums[name] += p.grad
            squares[kinds[name]] += float(p.grad.square().sum())
    model.zero_grad()
    found: dict[str, float | None] = {}
    for kind, total in squares.items():
        of_sum = sum(float(s.square().sum()) for n, s in sums.items() if kinds[n] == kind)
        signal = (of_sum - total) / (BATCHES * (BATCHES - 1))  # products of different batches alone
        variance = total / BATCHES - signal  # of one batch
        found[kind] = config.batch * config.model.context * variance / signal if signal > 0 else None
    return found


def train(name: str, protocol_file: Path, steps: int) -> Iterator[dict[str, Any]]:
    """The rows of one contender."""
    protocol = protocol_files.load(protocol_file)
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    config = protocol.run(name, data=data, seed=protocol.seeds[0], steps=steps, device="cpu")
    torch.set_num_threads(config.threads)
    model = build.build(config.model, seed=config.seed)
    row = table.of(config.optimizer)
    optimizer = row.build(model, row.settings(config.optimizer.settings), config.seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    kinds, parameters = kinds_of(model), list(model.parameters())
    seen = torch.full((config.model.vocabulary,), -EVERY)
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedules.factor(config.schedule, step, steps=steps)
        batch = ids.batch(seed=config.seed, step=step, size=config.batch, context=config.model.context)
        seen[batch.unique()] = step
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        look = (step + 1) % EVERY == 0
        before = {n: p.detach().clone() for n, p in model.named_parameters()} if look else {}
        optimizer.step()
        if look:
            for found in measured(model, optimizer, kinds, before, step - seen >= EVERY):
                m_squares, h_sum = found.pop("m_squares"), found.pop("h_sum")
                drawn = optimizer.stats()["B"] if isinstance(optimizer, Sophia) else 0.0
                per_token = config.batch * (config.model.context - 1)
                ratio = math.sqrt(m_squares / (h_sum / per_token)) if drawn and h_sum else None
                yield {"kind": "step", "contender": name, "step": step + 1, **found, "m_noise": ratio}
        optimizer.zero_grad()
        if step + 1 in (steps // 20, steps // 2, steps):
            scale = noise_scale(model, kinds, ids, config, seed=10_000 + config.seed)
            yield {"kind": "noise", "contender": name, "step": step + 1, "scale": scale}


def draw(record: Path, picture: Path) -> None:
    """Four panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in record.read_text().splitlines()]
    steps = [r for r in rows if r["kind"] == "step"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    titles = ("AdamW", "published", "damped", "spectral")
    words = dict(zip(CONTENDERS, titles, strict=True))
    colours = dict(zip(CONTENDERS, ("#777777", "#d1495b", "#2e86ab", "#3a7d44"), strict=True))
    bars = [
        (c, k)
        for k in ("tokens", "attention", "MLP", "vectors")
        for c in ("sophia-g", "sophia-damped", "sophia-spectral")
        if any(r["free"] is not None for r in steps if (r["contender"], r["tensors"]) == (c, k))
    ]
    ax = axes[0][0]
    left = [0.0] * len(bars)
    for share, colour, label in (
        ("clipped", "#d1495b", "moves by all of lr"),
        ("floor", "#edae49", "decided by the floor"),
        ("free", "#2e86ab", "decided by the curvature"),
    ):
        values = []
        for c, k in bars:
            found = [r[share] for r in steps if (r["contender"], r["tensors"]) == (c, k)]
            values.append(sum(found) / len(found))
        names = [f"{words[c]}: {k}" for c, k in bars]
        ax.barh(names, values, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ax.invert_yaxis()
    ax.set(title="Who decides the step of a coordinate (mean over the run)", xlabel="share of coordinates")
    ax.set_xlim(0, 1)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=8)

    ax = axes[0][1]
    for c in CONTENDERS:
        for k, style in (("tokens", "-"), ("MLP", "--")):
            mine = [r for r in steps if (r["contender"], r["tensors"]) == (c, k)]
            ax.plot([r["step"] for r in mine], [r["size"] for r in mine], style, color=colours[c])
    ax.set(title="Rms of the step over lr: token table (solid), MLP (dashed)", xlabel="steps", yscale="log")

    ax = axes[1][0]
    for c in CONTENDERS:
        mine = [r for r in steps if r["contender"] == c and r["absent"] is not None]
        ax.plot([r["step"] for r in mine], [r["absent"] for r in mine], color=colours[c], label=words[c])
    ax.axhline(1, color="#bbbbbb", lw=0.8)
    ax.set_title("Rows of tokens not seen for ten steps: part of the\nsquared step over part of the rows")
    ax.set(xlabel="steps", yscale="log")
    ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.8), ncols=2)

    ax = axes[1][1]
    last = [r for r in rows if r["kind"] == "noise"]
    kinds = list(last[0]["scale"])
    for c in CONTENDERS:
        mine = [r for r in last if r["contender"] == c]
        for r, size in zip(mine, (25, 60, 110), strict=True):
            values = [(k, v) for k, v in r["scale"].items() if v]
            ax.scatter([k for k, _ in values], [v for _, v in values], s=size, color=colours[c], alpha=0.6)
    ax.axhline(1024, color="#777777", lw=0.8, ls=":")
    ax.text(-0.45, 1100, "one batch", va="bottom", ha="left", fontsize=8)
    ax.set_xlim(-0.5, len(kinds) - 0.5)
    ax.set(title="Noise scale in tokens; larger dots: later in the run", yscale="log")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main(protocol: Path, out: Path, steps: int) -> None:
    """Train and write."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for name in CONTENDERS:
            for row in train(name, protocol, steps):
                rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
                file.write(json.dumps(rounded) + "\n")
            print(name, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("files", type=Path, nargs=2)
    parser.add_argument("steps", type=int, nargs="?", default=200)
    options = parser.parse_args()
    if options.draw:
        draw(*options.files)
    else:
        main(*options.files, options.steps)
