"""What the parts of ``gpu_day.py`` share: where and how large they run, a clock, times taken turn about."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophia.lab.bench.timing import Clock, Ratio, clock_of
from sophia.lab.config.run import Model
from sophia.lab.models import build
from sophia.lab.protocols import recipe

ABSENT = "not on this device"
TOY = Model(layers=1, width=32, heads=2, context=32, vocabulary=256)


@dataclass(frozen=True)
class Scene:
    """Where a part runs and until when."""

    device: str
    """"cuda", or "cpu" for the dry run, where all is of toy size."""
    ends: float
    """When the part should be over, by ``time.monotonic``."""
    tokens: tuple[Path, ...] = ()
    """Files of tokens for the race; the built-in text without."""

    @property
    def toy(self) -> bool:
        """Whether it is the dry run."""
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds until it should be over."""
        return self.ends - time.monotonic()

    def model(self, name: str) -> Model:
        """The model of a recipe, or the toy in its place."""
        return TOY if self.toy else recipe.find(name).model

    def clock(self) -> Clock:
        """Seconds, of which differences count: of the processor, or between CUDA events."""
        return clock_of("cpu") if self.toy else EventClock()

    def peak_above(self, work: Callable[[], object]) -> int | str:
        """Bytes of the device that ``work`` has out at its peak beyond those before it."""
        if self.toy:
            work()
            return ABSENT
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def release(self) -> None:
        """Give back what has been deleted."""
        gc.collect()
        if not self.toy:
            torch.cuda.empty_cache()


class EventClock:
    """Seconds by CUDA events, each waited for: from one idle moment of the device to the next."""

    def __init__(self) -> None:
        self._last, self._total = self._mark(), 0.0

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event

    def __call__(self) -> float:
        # Summed over short spans: the time between two events is a float32 of milliseconds.
        now = self._mark()
        self._total += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._total


@dataclass(frozen=True)
class Turns:
    """A time beside a reference's, taken turn about."""

    ratio: Ratio
    own: float
    """Median of the seconds."""
    reference: float
    rounds: int

    def to_json(self, *, steps: int = 1) -> dict[str, Any]:
        """Plain numbers; milliseconds of one of the ``steps`` that were timed together."""
        return {
            **self.ratio.to_json(),
            "milliseconds": round(self.own / steps * 1e3, 4),
            "reference_milliseconds": round(self.reference / steps * 1e3, 4),
            "rounds": self.rounds,
        }


def turn_about(
    own: Callable[[], object], reference: Callable[[], object], *, scene: Scene, rounds: int
) -> Turns:
    """Time ``own`` between two of ``reference`` (A B A), once at least and until the part should be over."""
    clock = scene.clock()

    def seconds(work: Callable[[], object]) -> float:
        start = clock()
        work()
        return clock() - start

    seconds(reference)
    ratios, mine, theirs = [], [], [seconds(reference)]
    while not ratios or (len(ratios) < rounds and scene.left() > 0):
        mine.append(seconds(own))
        theirs.append(seconds(reference))
        ratios.append(2 * mine[-1] / (theirs[-2] + theirs[-1]))
    return Turns(Ratio.of(ratios), statistics.median(mine), statistics.median(theirs), len(ratios))


def with_gradients(config: Model, device: str) -> nn.Module:
    """A model made on the device, the same at each call, with gradients that stay."""
    with torch.device(device):
        model = build.build(config, seed=1)
    generator = torch.Generator(device).manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device=device) * 1e-3
    return model


def say(line: str) -> None:
    """A line on the screen, at once."""
    print(f"    {line}", flush=True)
