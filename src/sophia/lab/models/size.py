"""What a run takes before it is run: parameters, FLOPs and memory, from shapes alone.

FLOPs of a token, forward and backward: 6 N + 12 L C d, for N parameters (a tied matrix counts once), L
layers, C tokens of context and d width; the second term is the attention's scores, not halved for the
causal mask (Chowdhery et al., arXiv 2204.02311, appendix B). It gives the figures of the paper's table of
costs, as recalled, within half a percent.

Memory is in bytes of one device:

    weights 4 N, gradients 4 N, two averages 8 N         (float32; shared by the devices if sharded)
    gradients of a refresh 4 N                           (Sophia, while it lasts)
    activations of the rows of a micro-batch             34 C d L a row in bfloat16, attention not stored
    logits                                               10 C V a row: bfloat16, float32, gradient in float32

34 bytes a token, layer and unit of width is the count of Korthikanti et al. (arXiv 2205.05198, section 4) of
a block in half precision with the attention's own matrices left out, as the fused attention leaves them.
With activations recomputed by the block, 2 of the 34 remain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sophia.lab.config.run import Model, Run
from sophia.lab.models import build
from sophia.lab.optimizers import table

__all__ = ["Forecast", "flops_per_token", "forecast", "parameters"]


def parameters(model: Model) -> int:
    """Trained numbers, counted on a model that is built without them.

    >>> parameters(Model(layers=12, heads=12, width=768, context=1024, vocabulary=50257))
    124439808
    """
    with torch.device("meta"):
        return build.parameter_count(build.build(model, seed=0))


def flops_per_token(model: Model, count: int) -> int:
    """Of a forward and a backward, for a model of ``count`` parameters."""
    return 6 * count + 12 * model.layers * model.context * model.width


@dataclass(frozen=True)
class Forecast:
    """Of one run on ``devices`` equal devices."""

    parameters: int
    tokens: int
    flops_per_step: float
    """With the contender's extra gradient evaluations, on average over steps."""
    flops: float
    """Of the whole run."""
    weights: int
    """Bytes a device: weights, gradients, optimizer state."""
    refresh: int
    """Bytes a device while a refresh lasts."""
    activations: int
    """Bytes a device of the rows of one micro-batch, logits included."""

    @property
    def peak(self) -> int:
        """Bytes a device. A refresh comes when the activations of the step are gone, with those of its
        own.
        """
        return self.weights + self.refresh + self.activations


def forecast(
    run: Run, *, devices: int = 1, sharded: bool = False, recompute: bool = False, count: int | None = None
) -> Forecast:
    """Of a run; ``count`` saves building the model."""
    model = run.model
    n = parameters(model) if count is None else count
    row = table.of(run.optimizer)
    settings = row.settings(run.optimizer.settings)
    share = devices if sharded else 1
    width = 2 if run.precision == "bfloat16" else 4
    rows = max(1, run.batch // (devices * run.micro_batches))
    per_block = (1 if recompute else 17) * width  # 34 bytes in half precision are 17 numbers
    activations = rows * model.context * (per_block * model.width * model.layers)
    logits = rows * model.context * model.vocabulary * (width + 8)
    flops = flops_per_token(model, n) * run.tokens_per_step * (1 + row.gradients(settings))
    return Forecast(
        parameters=n,
        tokens=run.steps * run.tokens_per_step,
        flops_per_step=flops,
        flops=flops * run.steps,
        weights=n * (8 + row.state_per_parameter) // share,
        refresh=n * 4 // share if row.gradients(settings) else 0,
        activations=activations + logits,
    )
