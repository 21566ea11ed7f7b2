"""How far hidden matrices should move beside the rest, at several widths: a direction, not evidence.

    python studies/own_rules/probe_proportions.py PROTOCOL.toml OUT.jsonl [WIDTH ...]

The protocol's model and wider ones, 200 steps, the protocol's first seed and its settings but for the
rates: one for hidden matrices, one for the rest. Appends a line for each run as it ends; what is in the
file is not made again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophia.lab.config import schedules
from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.models import build
from sophia.lab.optimizers import adamw, adamw_apart, table
from sophia.lab.protocols import protocol_file as protocol_files
from sophia.lab.support import provenance
from sophia.lab.support.json_lines import append_line, whole_lines

STEPS = 200

# width: (contender, rate of the rest, rate of the hidden matrices)
POINTS: dict[int, list[tuple[str, float, float]]] = {
    96: [
        ("sophia-damped", 0.0126, 0.000158),
        ("sophia-damped", 0.0126, 0.000315),
        ("sophia-damped", 0.0126, 0.00063),
        ("sophia-damped", 0.0126, 0.00126),
        ("sophia-damped", 0.02, 0.0005),
        ("sophia-damped", 0.02, 0.00075),
        ("sophia-damped", 0.025, 0.000313),
        ("sophia-damped", 0.025, 0.000625),
        ("sophia-damped", 0.025, 0.00125),
        ("sophia-damped", 0.05, 0.000625),
        ("sophia-spectral", 0.0135, 0.00135),
        ("sophia-spectral", 0.0135, 0.0027),
        ("sophia-spectral", 0.027, 0.00135),
        ("sophia-spectral", 0.027, 0.0027),
    ],
    192: [
        ("sophia-damped", 0.0063, 0.000158),
        ("sophia-damped", 0.0063, 0.000315),
        ("sophia-damped", 0.0126, 0.000158),
        ("sophia-damped", 0.0126, 0.000315),
        ("sophia-damped", 0.0126, 0.00063),
        ("sophia-damped", 0.0126, 0.00126),
        ("sophia-damped", 0.025, 0.000313),
        ("sophia-damped", 0.025, 0.000625),
        ("sophia-damped", 0.0089, 0.000222),
    ],
    384: [
        ("adamw", 0.0006, 0.0006),
        ("adamw", 0.0012, 0.0012),
        ("adamw", 0.0024, 0.0024),
        ("adamw-apart", 0.0218, 0.000158),
        ("adamw-apart", 0.0218, 0.000632),
        ("sophia-damped", 0.00315, 7.88e-05),
        ("sophia-damped", 0.0063, 3.94e-05),
        ("sophia-damped", 0.0063, 7.88e-05),
        ("sophia-damped", 0.0063, 0.000158),
        ("sophia-damped", 0.0126, 7.88e-05),
        ("sophia-damped", 0.0126, 0.000158),
        ("sophia-damped", 0.0126, 0.000315),
        ("sophia-damped", 0.0126, 0.00063),
        ("sophia-spectral", 0.0135, 0.000169),
        ("sophia-spectral", 0.0135, 0.000338),
        ("sophia-spectral", 0.0135, 0.000675),
        ("sophia-spectral", 0.0135, 0.00135),
        ("sophia-spectral", 0.0135, 0.0027),
        ("sophia-spectral", 0.027, 0.00135),
        ("sophia-spectral", 0.027, 0.0027),
        ("sophia-spectral", 0.027, 0.0054),
        ("sophia-damped", 0.0045, 0.000112),
        ("sophia-spectral", 0.00675, 0.00135),
        ("sophia-spectral", 0.00338, 0.000675),
    ],
}


def made(contender: str, rest: float, hidden: float) -> Callable[..., torch.optim.Optimizer]:
    """The contender with these two rates; those of Sophia count a step of rms or bound 1."""

    def make(model: nn.Module, s: Mapping[str, Any], seed: int) -> torch.optim.Optimizer:
        if contender == "adamw":
            return adamw.build(model, {**s, "lr": rest}, seed)
        if contender == "adamw-apart":
            return adamw_apart.build(model, {**s, "lr": rest, "matrix_lr": hidden}, seed)
        row = table.find(contender)
        optimizer = row.build(model, row.settings({**s, "lr": rest}), seed)
        scales = {group["scale"] for group in optimizer.param_groups}
        for group in optimizer.param_groups:
            group["scale"] = hidden / rest if group["scale"] == min(scales) else 1.0
        return optimizer

    return make


def trained(config: Any, make: Callable[..., torch.optim.Optimizer], ids: Any) -> tuple[float, float]:
    """Train as ``config`` says with what ``make`` gives; return held-out loss and processor seconds."""
    context, began = config.model.context, time.process_time()
    torch.set_num_threads(config.threads)
    model = build.build(config.model, seed=config.seed)
    parameters = list(model.parameters())
    optimizer = make(model, config.optimizer.settings, config.seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(config.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedules.factor(config.schedule, step, steps=config.steps)
        batch = ids.batch(seed=config.seed, step=step, size=config.batch, context=context)
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


def main(protocol_file: Path, out: Path, widths: list[int]) -> None:
    """Run what is missing."""
    protocol = protocol_files.load(protocol_file)
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    commit = provenance.describe(threads=1, device="cpu")["commit"]
    known = {(r["width"], r["contender"], r["rest"], r["hidden"]) for r in whole_lines(out)}
    for width in widths:
        wider = replace(protocol, model=replace(protocol.model, width=width))
        for contender, rest, hidden in POINTS[width]:
            if (width, contender, rest, hidden) in known:
                continue
            config = wider.run(contender, data=data, seed=protocol.seeds[0], steps=STEPS, device="cpu")
            loss, seconds = trained(config, made(contender, rest, hidden), ids)
            row = {"width": width, "contender": contender, "rest": rest, "hidden": hidden, "loss": loss}
            row |= {"cpu_seconds": seconds, "seed": config.seed}
            settings = {k: v for k, v in config.optimizer.settings.items() if "lr" not in k}
            row |= {"settings": {**settings, "warmup_steps": config.schedule.warmup}}
            append_line(out, {**row, "commit": commit})
            print(f"{contender} {width}: {rest} and {hidden}: {loss}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("protocol", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("width", type=int, nargs="*", default=list(POINTS))
    options = parser.parse_args()
    main(options.protocol, options.out, options.width)
