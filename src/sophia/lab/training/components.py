"""Components of a run, built from its configuration: model, optimizer, held-out text; and the passes over
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sophia.lab.config.run import Run
from sophia.lab.data.tokens import Tokens, bits_per_byte
from sophia.lab.models import build
from sophia.lab.optimizers import table
from sophia.lab.optimizers.contender import Contender
from sophia.lab.support.allocator import keep_freed_memory
from sophia.lab.support.errors import UsageError
from sophia.lab.training.processes import Solo

__all__ = ["Components", "components", "gradients", "held_out_loss"]


_SHORT = 256
"""Tokens of context whose attention scores are small enough to be stored."""


@dataclass(frozen=True)
class Components:
    """Model, optimizer and held-out text of a run."""

    run: Run
    team: Solo
    """The processes of the run."""
    device: torch.device
    model: nn.Module
    """In its wrapper, on the device."""
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    contender: Contender
    """How it was built, and whether it is given a closure."""
    peaks: list[float]
    """Learning rate of each parameter group, before the schedule's factor."""
    gradients_per_step: float
    """Gradient evaluations of a step, on average: 1, and the passes of the optimizer."""
    held_out: Tensor
    """Token ids (sequences, context)."""
    held_out_bytes: int
    """Bytes of text that they predict; 0 where that is not known."""

    @property
    def limit(self) -> float:
        """Largest norm of a gradient; longer ones are clipped."""
        return self.run.clip or math.inf

    def bits_per_byte(self, loss: float) -> float | None:
        """A held-out loss in nats a token by the bytes of the text."""
        predictions = self.held_out[:, 1:].numel()
        return bits_per_byte(loss, predictions=predictions, bytes_=self.held_out_bytes)


def components(run: Run, tokens: Tokens, team: Solo, *, recompute: bool) -> Components:
    """Build them. ``recompute`` trades the activations of the blocks for a second forward.

    Raises ``UsageError`` if the batch cannot be cut into equal parts, or the text is too short.
    """
    torch.set_num_threads(run.threads)
    keep_freed_memory()
    device = team.device(run.device)
    if run.batch % (run.micro_batches * team.size):
        raise UsageError(
            f"a batch of {run.batch} sequences cannot be cut into {run.micro_batches} equal parts on each of "
            f"{team.size} processes. Use micro-batches and processes whose product divides it."
        )
    tokens.require(run.model.context, "The text")
    held_out, held_out_bytes = tokens.held_out(sequences=run.evaluation.sequences, context=run.model.context)

    model = build.build(run.model, seed=run.seed)
    if run.precision == "bfloat16" and device.type == "cpu" and run.model.context <= _SHORT:
        # In half precision a processor's fused attention takes longer over few tokens than plain products.
        model.set_attn_implementation("eager")  # type: ignore[operator]
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    # The optimizer comes last: it holds the parameters as they are after wrapping and moving.
    model = team.place(model, device, precision=run.precision)
    row = table.of(run.optimizer)
    settings = row.settings(run.optimizer.settings)
    optimizer = row.build(model, settings, run.seed)
    return Components(
        run=run,
        team=team,
        device=device,
        model=model,
        parameters=[p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        contender=row,
        # Read before a checkpoint is loaded, which puts the rates of its own step into the groups.
        peaks=[group["lr"] for group in optimizer.param_groups],
        gradients_per_step=1 + row.gradients(settings),
        held_out=held_out,
        held_out_bytes=held_out_bytes,
    )


def gradients(parts: Components, batch: Tensor) -> tuple[float, float]:
    """Put the gradients of a batch, clipped, into the parameters; return the loss and the norm before
    clipping.
    """
    team, pieces, loss = parts.team, parts.run.micro_batches, 0.0
    for number, piece in enumerate(team.share(batch).to(parts.device).chunk(pieces), 1):
        with team.accumulating(parts.model, last=number == pieces):
            with team.autocast(parts.device, parts.run.precision):
                # Divided before the backward: the sum over the pieces is the gradient of the batch's mean.
                piece_loss = parts.model(input_ids=piece, labels=piece).loss / pieces
            piece_loss.backward()
        loss += float(piece_loss.detach())
    (loss,) = team.mean([loss])
    norm = torch.nn.utils.clip_grad_norm_(parts.parameters, parts.limit)
    return loss, float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of shards: a shard


@torch.no_grad()
def held_out_loss(parts: Components) -> float:
    """Mean loss over the held-out predictions; parts of unequal size weigh by their size."""
    team, model, held_out = parts.team, parts.model, parts.held_out.to(parts.device)
    rows = max(1, parts.run.batch // (parts.run.micro_batches * team.size))
    mine, total = held_out[team.rank :: team.size], 0.0
    # As many forwards in every process as in the one that has most: wrappers gather weights in each of them,
    # and a process that made fewer would leave the others waiting. Its last ones count nothing.
    most = -(-len(held_out) // team.size)
    model.eval()
    with team.autocast(parts.device, parts.run.precision):
        for start in range(0, most, rows):
            piece = mine[start : start + rows]
            if len(piece):
                total += float(model(input_ids=piece, labels=piece).loss) * len(piece)
            else:
                model(input_ids=held_out[:1])
    model.train()
    total, count = team.mean([total, float(len(mine))])
    return total / count
