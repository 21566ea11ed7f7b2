"""Refreshes of h: schedule, age, passes, and the estimates that are skipped.

A refresh is due on steps 0, k, 2k, ... and happens before the step is taken (Algorithm 3). In replay mode it
runs recorded training forwards again; by hand, the user runs what he likes inside ``with
optimizer.hessian_pass()``. Either way it happens in the sandbox, and its result is one ``Estimate`` or the
reason why there is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sophia.checks import SophiaWarning
from sophia.curvature.estimate import Diagonals, Estimate, Estimator, PassByHand, PassContext
from sophia.distributed.collectives import Ranks
from sophia.distributed.process_groups import ranks_of
from sophia.distributed.shards import is_dtensor, local
from sophia.distributed.wrappers import reducing
from sophia.refresh.recorder import Recorder
from sophia.refresh.replay import Replay, RowsCannotBeTaken, choose
from sophia.refresh.sandbox import sandbox
from sophia.refresh.seeds import generator, seed_for

__all__ = ["Refresher", "is_due", "staleness"]


def is_due(step: int, update_every: int) -> bool:
    """Whether h is renewed before step number ``step`` (from 0)."""
    return step % update_every == 0


def staleness(step: int, refreshed: int, update_every: int, mode: str) -> str | None:
    """What to say if the h that step number ``step`` uses is older than two intervals; None if it is not.

    ``refreshed`` is the step before which h was last renewed, -1 for never.
    """
    if step - max(refreshed, 0) <= 2 * update_every:
        return None
    advice = (
        f"Run `with opt.hessian_pass() as hp: ...` every {update_every} steps, or use mode='replay'"
        if mode == "manual"
        else "See opt.stats()['skipped']: the passes since then were skipped"
    )
    if refreshed < 0:
        return (
            f"the Hessian was never refreshed in {step} steps (update_every={update_every}): h is all zero "
            "and step() is sign momentum, "
            f"not Sophia. {advice}"
        )
    return (
        f"the Hessian was last refreshed {step - refreshed} steps ago (update_every={update_every}): h is "
        "stale and the clipping follows "
        f"an old curvature. {advice}"
    )


class Refresher:
    """Runs Hessian passes; owns no tensor.

    Args:
        estimator: turns a pass into an estimate.
        fraction: share of the recorded micro-batches or rows that a replay runs.
        group: process group whose ranks train the same parameters; None for the default one, False for none.
    """

    def __init__(self, estimator: Estimator, *, fraction: float, group: Any) -> None:
        self.estimator, self.fraction, self.group = estimator, fraction, group
        self._least_rows: int | None = 1  # None: the model runs on whole batches alone

    def replay(self, recorder: Recorder, parameters: list[Tensor], *, seed: int, step: int) -> Estimate:
        """Estimate the curvature from the recorded forwards.

        Raises:
            RuntimeError: no forward was recorded, inputs were overwritten, or the parameters are no longer
            the model's.
        """
        self.check_estimator(parameters)
        ranks = self.ranks(recorder.model, parameters)
        key = (seed, step, ranks.number)

        def chosen() -> list[Replay]:
            check_recorded(recorder, step)
            check_ownership(parameters, recorder.model)
            return choose(recorder, fraction=self.fraction, key=key, least_rows=self._least_rows)

        with (
            sandbox(recorder.model, parameters, seed=seed_for(*key, "dropout")),
            reducing(recorder.model),
        ):
            while True:
                # All ranks choose before any runs: an error in the choice (overwritten inputs, say) is raised
                # on all, and none is left waiting in a collective of the pass.
                batches = ranks.together(chosen)
                ranks.check_same(parameters)
                # B is known before the pass, so that the sum of the losses is divided by sqrt(B) at once and
                # fits in half precision.
                counts = [
                    ranks.total(sum(of_head)) for of_head in zip(*(b.counts for b in batches), strict=True)
                ]
                if sum(counts) == 0:
                    return Estimate([None] * len(parameters), 0.0)
                agreement = _Agreement(ranks)
                try:
                    with agreement:
                        return self.estimator.estimate(
                            self._context(parameters, batches, counts, (seed, step), agreement)
                        )
                except RowsCannotBeTaken as reason:  # on all ranks, or on none
                    if self._least_rows == 1 and not ranks.lockstep:
                        self._least_rows = 2  # a single row has no variance: BatchNorm refuses it
                    else:
                        self._take_whole_batches(recorder.model, ranks, reason)
                # What a pass that was given up left there must not enter the next one.
                for parameter in parameters:
                    parameter.grad = None

    def _take_whole_batches(self, model: nn.Module, ranks: Ranks, reason: RowsCannotBeTaken) -> None:
        said = f"{type(model).__name__} does not run on a part of the rows of its inputs ({reason})"
        if ranks.lockstep:
            raise RuntimeError(
                f"{said}, and a sharded forward that was left half-way cannot be begun again. Pass "
                "fraction=1.0: then a refresh takes the whole batch"
            ) from reason
        self._least_rows = None
        warnings.warn(
            f"{said}: every refresh takes the whole batch from now on. Pass fraction=1.0 to mean it",
            SophiaWarning,
        )

    @contextmanager
    def by_hand(
        self, model: nn.Module | None, parameters: list[Tensor], *, seed: int, step: int
    ) -> Iterator[PassByHand]:
        """Hand out the estimator's handle inside the sandbox; call its ``finish`` before leaving the
        block.
        """
        self.check_estimator(parameters)
        ranks = self.ranks(model, parameters)
        ranks.check_same(parameters)
        agreement = _Agreement(ranks)
        dropout = seed_for(seed, step, ranks.number, "dropout")
        # The user may go through a DDP wrapper here, whose buckets share memory with the gradients in .grad.
        with sandbox(model, parameters, seed=dropout, copies=bool(ranks.data)), reducing(model), agreement:
            yield self.estimator.by_hand(self._context(parameters, [], [], (seed, step), agreement))

    def ranks(self, model: nn.Module | None, parameters: Sequence[Tensor]) -> Ranks:
        """The ranks that train these parameters."""
        return ranks_of(model, parameters, self.group)

    def check_estimator(self, parameters: Sequence[Tensor]) -> None:
        """Raise RuntimeError if the estimator differentiates twice and the parameters' wrapper cannot."""
        sharded = sum(is_dtensor(p) or getattr(p, "_fsdp_flattened", False) for p in parameters)
        if sharded and self.estimator.differentiates_twice:
            raise RuntimeError(
                f"{type(self.estimator).__name__} differentiates twice, but {sharded} of {len(parameters)} "
                "parameters are sharded, and gathering and reducing them has no second derivative. Use "
                "estimator='gnb', or DDP"
            )

    def _context(
        self,
        parameters: list[Tensor],
        batches: Sequence[Replay],
        counts: Sequence[float],
        key: tuple[int, ...],
        agreement: _Agreement,
    ) -> PassContext:
        device, ranks = parameters[0].device, agreement.ranks

        def summed(tensors: Diagonals) -> Diagonals:
            agreement.reach()
            return ranks.sum_gradients(tensors, parameters)

        def counted(count: int) -> float:
            agreement.reach()
            return ranks.total(count)

        def shared(purpose: str) -> torch.Generator:
            return generator(device, *key, purpose)

        count = float(sum(counts))
        return PassContext(parameters, batches, count, shared, ranks.number, summed, counted, counts)

    def objection(self, estimate: Estimate, device: torch.device, ranks: Ranks) -> str | None:
        """Why an estimate must not enter h, or None; the same on all ranks. One synchronisation with the
        device a refresh.
        """
        if estimate.count == 0:
            return "no prediction was counted (every label masked?)"
        # Lowest and highest hand NaN on, and cost a thirtieth of an infinity norm on a CPU.
        ends = [
            end.to(device, torch.float32).abs()
            for d in estimate.diagonal
            if d is not None and local(d).numel()
            for end in torch.aminmax(local(d))
        ]
        top = torch.stack(ends).amax() if ends else torch.zeros(())
        finite, zero = (bool(flag) for flag in torch.stack([top.isfinite(), top == 0]).tolist())
        infinite, anything = ranks.any_of(not finite, not zero)
        if infinite:
            return "it is not finite (an overflow, or NaN in the weights)"
        if not anything:
            return "it is zero everywhere (logits detached from the parameters?)"
        return None


class _Agreement:
    """Agreement of the ranks, once in a pass, on whether it worked: before the first sum, or when something
    failed, or at the end if there was neither.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._reached = ranks, False

    def reach(self, error: Exception | None = None) -> None:
        """Agree, once. With an error, nothing comes after it: it is raised, on all ranks where that is
        possible.
        """
        if error is not None and (self._reached or self.ranks.lockstep):
            raise error  # the others are not here: they wait inside a forward, and end when this process does
        if not self._reached:
            self._reached = True
            self.ranks.agree(error, mild=RowsCannotBeTaken)

    def __enter__(self) -> _Agreement:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.reach()
        elif isinstance(error, Exception) and not self._reached:
            self.reach(error)


def check_recorded(recorder: Recorder, step: int) -> None:
    """Raise RuntimeError if no training forward was recorded since the last step."""
    if not recorder.recordings:
        raise RuntimeError(
            f"a Hessian refresh is due at step {step}, but the attached module "
            f"{type(recorder.model).__name__} ran no forward in training mode "
            "since the last step. Pass the module that is really called and returns logits (not a "
            "LightningModule or wrapper), call "
            "model.train(), or use mode='manual'"
        )


def check_ownership(parameters: Sequence[Tensor], model: nn.Module) -> None:
    """Raise RuntimeError unless all parameters of the optimizer are parameters of the attached model."""
    owned = {id(parameter) for parameter in model.parameters()}
    lost = sum(id(parameter) not in owned for parameter in parameters)
    if lost:
        raise RuntimeError(
            f"{lost} of {len(parameters)} optimizer parameters are not, or no longer, parameters of "
            f"{type(model).__name__}; a wrapper (DeepSpeed ZeRO, "
            "FSDP1 flat parameters) or a second model may have replaced them. Build Sophia after wrapping, "
            "attach(model) again, or use mode='manual'"
        )
