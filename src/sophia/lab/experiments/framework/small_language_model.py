"""The text and the two small language models of the experiments that look inside a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from sophia.lab.config import schedules
from sophia.lab.config.run import Model, Schedule, Setting
from sophia.lab.data import corpus, tokens
from sophia.lab.data.tokens import Tokens
from sophia.lab.models import build
from sophia.lab.optimizers import table

__all__ = ["SMALL", "TINY", "letters", "small", "text", "tiny", "training"]

TINY = Model(layers=1, width=8, heads=2, context=8, vocabulary=16)
"""1,080 parameters: its full Hessian fits."""
SMALL = Model(layers=3, width=96, heads=3, context=64, vocabulary=4096)
"""0.7M parameters, the model of the preset ``quick``."""


@cache
def text(quick: bool) -> Tokens:
    """The presidents' messages; of a few of them where a run takes seconds."""
    whole = corpus.load("sotu")
    if quick:
        whole = replace(whole, train=whole.train[:2], validation=whole.validation[:1])
    return tokens.encode(whole)


@cache
def letters(quick: bool) -> Tensor:
    """The same text as ids 0 to 15: its fifteen most frequent bytes, and one for all others."""
    whole = corpus.load("sotu")
    ids = tokens.as_bytes(replace(whole, train=whole.train[: 2 if quick else 20], validation=())).train
    rank = np.argsort(np.argsort(-np.bincount(ids, minlength=256), kind="stable"), kind="stable")
    return torch.from_numpy(np.minimum(rank[ids], 15).astype(np.int64))


def tiny(quick: bool, *, steps: int, seed: int = 1) -> nn.Module:
    """The tiny model in float64, after so many steps of AdamW on letters."""
    model = build.gpt2(TINY, seed=seed).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = windows(letters(quick), 32, TINY.context, generator)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def small(quick: bool) -> nn.Module:
    """The small model, or one of a few thousand parameters, before training."""
    return build.gpt2(shape(quick), seed=1)


def shape(quick: bool) -> Model:
    """What ``small`` builds."""
    return replace(SMALL, layers=1, width=4, heads=1, context=16) if quick else SMALL


def windows(ids: Tensor, number: int, context: int, generator: torch.Generator) -> Tensor:
    """Random stretches of the text, (number, context)."""
    starts = torch.randint(0, len(ids) - context, (number, 1), generator=generator)
    return ids[starts + torch.arange(context)]


def training(
    model: nn.Module,
    contender: str,
    settings: Mapping[str, Setting],
    source: Tokens,
    *,
    steps: int,
    batch: int,
    context: int,
    seed: int,
) -> Iterator[int]:
    """Train, and stop before the first step and after each, with the number of steps taken.

    Warm-up over a tenth, then a cosine to 0.05; gradients clipped at norm 1: the procedure of the lab. Look
    at the model's weights in between, but do not run the model: an optimizer may record what it does.
    """
    row = table.find(contender)
    optimizer = row.build(model, row.settings(settings), seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = Schedule(warmup=max(1, steps // 10))
    for step in range(steps):
        yield step
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedules.factor(schedule, step, steps=steps)
        ids = source.batch(seed=seed, step=step, size=batch, context=context)
        model(input_ids=ids, labels=ids).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            return
        optimizer.step()
        optimizer.zero_grad()
    yield steps
