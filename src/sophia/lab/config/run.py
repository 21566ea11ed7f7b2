"""What a run is: frozen dataclasses. Everything that changes the result is here, and nothing else.

The hash of the canonical JSON names the run and its folder, so equal configurations are the same run. Where a
run is written, how often it saves itself, or how it shows its progress does not change the result and is not
here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Literal

from annotated_types import Ge

from sophia.lab.config.field_types import (
    AboveZero,
    AtLeastZero,
    Count,
    Device,
    Fraction,
    Precision,
    ScheduleKind,
    Seed,
    Whole,
)
from sophia.lab.support.dataclass_json import LATER, canonical, checked_dataclass, to_json
from sophia.lab.support.errors import UsageError

__all__ = ["Data", "Evaluation", "Model", "Optimizer", "Run", "Schedule", "Setting"]

Setting = bool | int | float | str
"""A value of an optimizer's settings."""


@checked_dataclass(frozen=True)
class Data:
    """Which text, cut into which tokens."""

    corpus: str
    """Name: "sotu", "stdlib", or "own" for a text of the user's."""
    text: str
    """SHA-256 of the text and its split, hexadecimal."""
    vocabulary: str
    """SHA-256 of the vocabulary, hexadecimal."""


@checked_dataclass(frozen=True)
class Model:
    """A GPT-2 without dropout."""

    layers: Count = 3
    """Number of blocks."""
    width: Count = 96
    """Size of the residual stream."""
    heads: Count = 3
    """Attention heads; divides the width."""
    context: Annotated[int, Ge(2)] = 64
    """Tokens in a sequence, of which all but the first are predicted."""
    vocabulary: Count = 4096
    """Number of different tokens."""
    scale_attention_by_layer: bool = field(default=False, metadata=LATER)
    """Whether the attention scores of block i = 1, 2, ... are divided by i as well: the re-parameterisation
    for stability that others call scale_attn_by_inverse_layer_idx. GPT-2 alone has it.
    """
    kind: Literal["gpt2", "neox"] = field(default="gpt2", metadata=LATER)
    """"gpt2", or "neox": rotary positions, attention and MLP in parallel, a head of its own."""
    initial_scale: AboveZero = field(default=1.0, metadata=LATER)
    """Factor on the initial weights of every matrix and embedding. GPT-2 alone has it."""
    initial_query_key_scale: AboveZero = field(default=1.0, metadata=LATER)
    """A further factor on those of queries and keys, so on the first scores its square: a large one begins
    with attention that looks at one place, whose gradients a deep stack multiplies. GPT-2 alone has it.
    """

    def __post_init__(self) -> None:
        if self.kind == "neox" and (self.initial_scale, self.initial_query_key_scale) != (1.0, 1.0):
            raise UsageError(
                "model.initial_scale or model.initial_query_key_scale is not 1, but a neox is not built with "
                'them. Leave them out, or use model.kind = "gpt2".'
            )
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


@checked_dataclass(frozen=True)
class Schedule:
    """Learning-rate factor by step; see ``sophia.lab.config.schedules``."""

    kind: ScheduleKind = "cosine"
    """"cosine", or "wsd" (warm-up, stable, linear decay)."""
    warmup: Whole = 20
    """Steps of linear warm-up."""
    floor: Fraction = 0.05
    """Factor at the end, as a fraction of the peak."""
    decay: Fraction = 0.2
    """Fraction of the steps that decay, for "wsd"."""


@checked_dataclass(frozen=True)
class Optimizer:
    """A row of the table of contenders, and its settings."""

    contender: str
    """Name of the row."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Every setting of the row, by name; ``lr`` is the peak learning rate."""
    numerics: str = field(default="", metadata=LATER)
    """Versions of the numbers that it computes, where they are not the first: "gnb 2" (``sophia.numerics``).
    A run of the same settings with other numbers is another run.
    """


@checked_dataclass(frozen=True)
class Evaluation:
    """How the loss on held-out text is measured."""

    every: Count = 100
    """Steps between two evaluations; step 0 and the end are always evaluated."""
    sequences: Count = 256
    """Held-out sequences, the same at every evaluation of every run."""


@checked_dataclass(frozen=True)
class Run:
    """One training run."""

    data: Data
    optimizer: Optimizer
    model: Model = field(default_factory=Model)
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    steps: Count = 400
    """Optimizer steps."""
    batch: Count = 16
    """Sequences in a step."""
    micro_batches: Count = 1
    """Parts a batch is cut into, one forward and backward each."""
    clip: AtLeastZero = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    seed: Seed = 1
    """Decides initialisation, order of the data, and the optimizer's own draws."""
    log_every: Count = 10
    """Steps between two rows of the training log."""
    device: Device = "cpu"
    """Where it runs: "cpu" or "cuda". Both round differently."""
    threads: Count = 1
    """Threads of torch on the CPU. Sums are cut differently, so they round differently."""
    version: int = 1
    """Version of the training procedure; a change of its numbers makes another run."""
    precision: Precision = field(default="float32", metadata=LATER)
    """"float32", or "bfloat16": forwards and backwards in it, weights and optimizer state in float32."""

    def __post_init__(self) -> None:
        if self.batch % self.micro_batches:
            raise UsageError(
                f"batch is {self.batch} sequences and micro_batches {self.micro_batches}: parts of unequal "
                f"size would "
                f"weigh tokens unequally. Use a batch that is a multiple of {self.micro_batches}."
            )

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that name this run."""
        return hashlib.sha256(canonical(to_json(self)).encode()).hexdigest()[:12]

    @property
    def tokens_per_step(self) -> int:
        """Tokens read in a step."""
        return self.batch * self.model.context


def _largest_divisor(number: int, below: int) -> int:
    return max(d for d in range(1, below + 1) if number % d == 0)
