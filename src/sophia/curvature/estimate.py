"""Interface of an estimator of the diagonal curvature: one method, its context, its result.

An estimate is a pair (diagonal, count): the diagonal of the curvature of the *mean* loss, one tensor a
parameter, and the number of predictions that it was taken over. A count travels with every estimate because
almost every wrong Sophia in public is a wrong count.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sophia.curvature.last_layer import Readout

__all__ = ["Estimate", "Estimator", "MicroBatch", "PassByHand", "PassContext", "take_gradients"]

Diagonals = list[Tensor | None]


@dataclass(frozen=True)
class Estimate:
    """The diagonal of the curvature of the mean loss, and the count behind it."""

    diagonal: Diagonals
    """One tensor a parameter, of its shape, float32 or finer; None where the pass did not reach the
    parameter.
    """
    count: float
    """B, the number of predictions averaged, over all micro-batches and ranks."""
    drawn: bool = True
    """Whether the labels drawn gave a gradient in the outputs; if not, zero is what they estimate."""


class MicroBatch(Protocol):
    """One recorded forward of the training loop, ready to be run again."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the forward."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments of the forward."""

    @property
    def mask(self) -> Tensor:
        """Which predictions count, bool: ``(B, T)`` for logits ``(B, T, V)``; of the first head."""

    @property
    def count(self) -> int:
        """How many predictions count, over all heads."""

    @property
    def share(self) -> float:
        """What this part stands for: what counts in the step over what counts here, 1 or more."""

    @property
    def weights(self) -> Sequence[Tensor | None]:
        """What each prediction of an output weighs in the training loss, of the shape of its mask; None for
        1 / B.

        Before the mean over ranks, and whatever was done to the gradients afterwards:
        ``PassContext.factor``.
        """

    @property
    def stated(self) -> Sequence[Tensor | None]:
        """What each prediction of an output weighs in a mean, as the user has said; None for 1."""

    @property
    def masks(self) -> Sequence[Tensor]:
        """The mask of each output: one a head, and more where a loss used several tensors of one kind."""

    @property
    def heads(self) -> Sequence[int]:
        """The number of the head that each output is of."""

    @property
    def counts(self) -> Sequence[int]:
        """How many predictions of each head count."""

    def forward(self) -> Any:
        """Run the model on the recorded inputs under the recorded autocast; return what it returns."""

    def forward_with_readouts(self) -> tuple[Any, tuple[Readout | None, ...]]:
        """``forward()``, and for each output the call of the linear layer that made it, if it can be told."""

    def logits(self, output: Any) -> Tensor:
        """Return the output that the likelihood speaks of; the first one."""

    def outputs(self, output: Any) -> Sequence[Tensor]:
        """Return all of them, as many as masks."""

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """``torch.autograd.backward`` of some outputs, or of scalars made of them (None as gradient)."""

    def loss(self, output: Any) -> Tensor:
        """Return the training loss, averaged over the counted predictions of this micro-batch."""

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator of its own for this micro-batch, rank and step."""


@dataclass(frozen=True)
class PassContext:
    """One refresh, as an estimator sees it. The parameters' ``.grad`` is free to use: it is restored
    afterwards.
    """

    parameters: Sequence[Tensor]
    micro_batches: Sequence[MicroBatch]
    count: float
    """B over all micro-batches and ranks, known before the pass; 0 in a pass by hand."""
    shared_generator: Callable[[str], torch.Generator]
    """Noise that must be equal on all ranks, e.g. Hutchinson's probe, by purpose. On sharded parameters every
    shard
    would draw the same numbers: draw for the whole parameter and take the part.
    """
    rank: int = 0
    """Number of this process, for noise that must differ between the ranks."""
    sum_over_ranks: Callable[[Diagonals], Diagonals] = lambda tensors: tensors
    """Turns what the backward left in each parameter's ``.grad`` into the sum over all ranks, of the shape of
    the part that this rank holds. Call it once, on gradients, before anything is squared, and on every rank.
    """
    count_over_ranks: Callable[[int], float] = float
    """Adds up a count over the ranks; call it on every rank."""
    counts: Sequence[float] = ()
    """``count`` head by head."""
    totals: Sequence[float] = ()
    """The predictions of the whole step, head by head, over all ranks: ``counts`` where the pass runs all."""
    factor: float = 1.0
    """Of the weights that were read: from a process's loss to what stands in ``.grad``."""


class PassByHand(abc.ABC):
    """What ``with optimizer.hessian_pass() as hp`` hands out; see the estimators for its other methods."""

    @abc.abstractmethod
    def finish(self) -> Estimate:
        """Return the estimate; called when the block ends without an error."""

    def sampled_loss(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Summed negative log-likelihood of labels drawn from the model (Gauss-Newton-Bartlett)."""
        raise TypeError(
            f"{type(self).__name__} has no sampled_loss(): that is for estimator='gnb'. Use hp.add(loss, "
            "count)"
        )

    def add(self, loss: Tensor, count: int) -> None:
        """Take in the mean loss over ``count`` predictions of one micro-batch (Hutchinson, empirical
        Fisher).
        """
        raise TypeError(
            f"{type(self).__name__} has no add(): Gauss-Newton-Bartlett samples its own labels. "
            "Use hp.sampled_loss(logits, mask).backward()"
        )


class Estimator(abc.ABC):
    """Estimates the diagonal of the curvature. Derive from it to bring your own.

    >>> class Constant(Estimator):
    ...     def estimate(self, context):
    ...         return Estimate([torch.ones_like(p) for p in context.parameters], context.count)
    """

    signed: bool = False
    """True if the diagonal changes its sign with the loss (a Hessian does, a square does not)."""
    needs_outputs: bool = True
    """False if the loss is all that it needs: then a model may return nothing else."""
    differentiates_twice: bool = False
    """True if it needs the graph of a backward, which sharded parameters do not have."""

    @abc.abstractmethod
    def estimate(self, context: PassContext) -> Estimate:
        """Return the estimate from the recorded micro-batches of ``context``."""

    def by_hand(self, context: PassContext) -> PassByHand:
        """Return the handle for a pass that the user writes; optional."""
        raise TypeError(
            f"{type(self).__name__} has no pass by hand: give it a by_hand() method or use mode='replay'"
        )


def take_gradients(parameters: Sequence[Tensor]) -> Diagonals:
    """Collect ``.grad`` of all parameters, at least float32, and set it to None."""
    taken: Diagonals = []
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        taken.append(
            None if gradient is None else gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        )
    return taken
