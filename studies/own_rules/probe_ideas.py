"""Ideas beyond the two rules, one at a time, on a small model: a direction, not evidence.

    python studies/own_rules/probe_ideas.py PROTOCOL.toml OUT.jsonl [STEPS] [WORD]

The settings are the protocol's for both rules, the seeds its own; an idea is run on the next seed only after
all were run on the one before. Appends a line for each run as it ends; what is in the file is not made again.
WORD: only ideas whose name contains it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from sophia import Sophia
from sophia.lab.config import schedules
from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.models import build
from sophia.lab.optimizers.pair import Pair
from sophia.lab.protocols import protocol_file as protocol_files
from sophia.lab.support.json_lines import append_line, whole_lines
from sophia.step import rules
from sophia.update_rule import polar

Made = tuple[torch.optim.Optimizer, Callable[[int, Tensor], None]]


def nothing(step: int, batch: Tensor) -> None:
    """Before a step."""


def rule(model: nn.Module, s: Mapping[str, Any], seed: int, params: Any = None, **over: Any) -> Sophia:
    """Sophia with the settings of the protocol."""
    return Sophia(
        model if params is None else params,
        model=model,
        rule=str(s["rule"]),
        lr=float(s["lr"]),
        betas=(float(s["beta1"]), float(s["beta2"])),
        gamma=float(s["gamma"]),
        damping=float(s["damping"]),
        weight_decay=float(s["weight_decay"]),
        seed=seed,
        **over,
    )


def as_it_is(model: nn.Module, s: Mapping[str, Any], seed: int) -> Made:
    """The rule."""
    return rule(model, s, seed), nothing


def every(k: int) -> Callable[..., Made]:
    """Another interval of refreshes."""
    return lambda model, s, seed: (rule(model, s, seed, update_every=k), nothing)


def tables_by_adam(part: float) -> Callable[..., Made]:
    """The token table has the second moment of its own gradient (AdamW, beta2 0.99), and no h."""

    def make(model: nn.Module, s: Mapping[str, Any], seed: int) -> Made:
        table = [p for n, p in model.named_parameters() if "wte" in n]
        rest = [p for n, p in model.named_parameters() if "wte" not in n]
        adam = torch.optim.AdamW(
            table, lr=part * float(s["lr"]), betas=(float(s["beta1"]), 0.99), weight_decay=0.0
        )
        return Pair(rule(model, s, seed, params=rest), adam), nothing

    return make


def by_curvature_along_the_step(power: float) -> Callable[..., Made]:
    """Every hidden matrix by its measured curvature: lr times (mean q / q)^power, q = B (g . d)^2 of the
    gradient g of sampled labels, averaged over refreshes, with d the last step of the matrix.
    """

    def make(model: nn.Module, s: Mapping[str, Any], seed: int) -> Made:
        made = rule(model, s, seed)
        inner = [g for g in made.param_groups if g["scale"] != 1.0]
        matrices = [p for g in inner for p in g["params"]]
        for group in inner:  # a group for each matrix, so that each has a scale of its own
            first, *others = group["params"]
            group["params"] = [first]
            kept = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for p in others:
                made.param_groups.append({**kept, "params": [p]})
            group.pop("param_names", None)
        home = {id(g["params"][0]): g for g in made.param_groups if g["scale"] != 1.0}
        base = inner[0]["scale"]
        last = [p.detach().clone() for p in matrices]
        mean = [0.0] * len(matrices)
        generator = torch.Generator().manual_seed(seed)

        def before(step: int, batch: Tensor) -> None:
            if step and step % 10 == 0:
                half = batch[: len(batch) // 2]
                logits = model(input_ids=half).logits[:, :-1].flatten(0, 1)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
                loss = nn.functional.cross_entropy(logits, labels)
                drawn = torch.autograd.grad(loss, matrices)
                for i, (p, q, g) in enumerate(zip(matrices, last, drawn, strict=True)):
                    d = p.detach() - q
                    d = d / d.norm().clamp(min=1e-30)
                    value = len(labels) * float((g * d).sum()) ** 2
                    mean[i] = value if step == 10 else 0.8 * mean[i] + 0.2 * value
                whole = sum(mean) / len(mean)
                for p, value in zip(matrices, mean, strict=True):
                    factor = (whole / max(value, 1e-30)) ** power
                    home[id(p)]["scale"] = base * min(max(factor, 0.25), 4.0)
            for q, p in zip(last, matrices, strict=True):
                q.copy_(p.detach())

        return made, before

    return make


def in_bfloat16(x: Tensor) -> Tensor:
    """The products of the polar factor in half precision, as Muon makes them."""
    return polar(x.to(torch.bfloat16)).to(x.dtype)


# name: contender, how it is made, what stands in for the polar factor
IDEAS: dict[str, tuple[str, Callable[..., Made], Callable[[Tensor], Tensor] | None]] = {
    "spectral": ("sophia-spectral", as_it_is, None),
    "spectral, products in bfloat16": ("sophia-spectral", as_it_is, in_bfloat16),
    "spectral, tables by Adam, lr": ("sophia-spectral", tables_by_adam(1.0), None),
    "spectral, tables by Adam, lr / 2": ("sophia-spectral", tables_by_adam(0.5), None),
    "spectral, curvature along the step": ("sophia-spectral", by_curvature_along_the_step(0.25), None),
    "spectral, h every 2 steps": ("sophia-spectral", every(2), None),
    "spectral, h every 50 steps": ("sophia-spectral", every(50), None),
}


def trained(config: Any, make: Callable[..., Made], ids: Any) -> tuple[float, float]:
    """Train as ``config`` says with what ``make`` gives; return held-out loss and processor seconds."""
    context, began = config.model.context, time.process_time()
    torch.set_num_threads(config.threads)
    model = build.build(config.model, seed=config.seed)
    parameters = list(model.parameters())
    optimizer, before = make(model, config.optimizer.settings, config.seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(config.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedules.factor(config.schedule, step, steps=config.steps)
        batch = ids.batch(seed=config.seed, step=step, size=config.batch, context=context)
        before(step, batch)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.process_time() - began
    held_out, _ = ids.held_out(sequences=config.evaluation.sequences, context=context)
    model.eval()
    with torch.no_grad():
        parts = held_out.split(64)
        loss = sum(float(model(input_ids=x, labels=x).loss) * len(x) for x in parts) / len(held_out)
    return round(loss, 5), round(seconds, 1)


def run(idea: str, protocol: Any, text: Any, ids: Any, seed: int, steps: int) -> dict[str, Any]:
    """Train and return the row."""
    contender, make, polar_of = IDEAS[idea]
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    config = protocol.run(contender, data=data, seed=seed, steps=steps, device="cpu")
    with mock.patch.object(rules, "polar_of", polar_of or rules.polar_of):
        loss, seconds = trained(config, make, ids)
    settings = dict(config.optimizer.settings)
    row = {"idea": idea, "seed": seed, "steps": steps, "loss": loss, "cpu_seconds": seconds}
    return row | {"settings": settings}


def main(protocol_file: Path, out: Path, steps: int, word: str) -> None:
    """Run what is missing, idea by idea within a seed."""
    protocol = protocol_files.load(protocol_file)
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    done = {(row["idea"], row["seed"], row["steps"]) for row in whole_lines(out)}
    for seed in protocol.seeds:
        for idea in IDEAS:
            if word in idea and (idea, seed, steps) not in done:
                row = run(idea, protocol, text, ids, seed, steps)
                append_line(out, row)
                print(f"{idea}, seed {seed}: {row['loss']}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int, nargs="?", default=200)
    parser.add_argument("word", nargs="?", default="")
    options = parser.parse_args()
    main(options.protocol, options.out, options.steps, options.word)
