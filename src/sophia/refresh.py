"""When h is renewed, and from what: schedule, age, noise, and the passes that are skipped.

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

from sophia.attach import Recorder
from sophia.curvature.estimate import Diagonals, Estimate, Estimator, PassByHand, PassContext
from sophia.distributed import any_rank, rank, sum_count, sum_tensors
from sophia.guards import SophiaWarning
from sophia.noise import generator, seed_for
from sophia.replay import Replay, RowsCannotBeTaken, choose
from sophia.sandbox import sandbox

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
        self._rows_work = True

    def replay(self, recorder: Recorder, parameters: list[Tensor], *, seed: int, step: int) -> Estimate:
        """Estimate the curvature from the recorded forwards.

        Raises:
            RuntimeError: no forward was recorded, inputs were overwritten, or the parameters are no longer
            the model's.
        """
        if not recorder.recordings:
            raise RuntimeError(
                f"a Hessian refresh is due at step {step}, but the attached module "
                f"{type(recorder.model).__name__} ran no forward in training mode "
                "since the last step. Pass the module that is really called and returns logits (not a "
                "LightningModule or wrapper), call "
                "model.train(), or use mode='manual'"
            )
        check_ownership(parameters, recorder.model)
        key = (seed, step, rank(self.group))
        with sandbox(recorder.model, parameters, seed=seed_for(*key, "dropout")):
            batches = choose(recorder, fraction=self.fraction, key=key, rows_work=self._rows_work)
            try:
                return self._estimate(batches, parameters, seed=seed, step=step)
            except RowsCannotBeTaken as reason:
                self._rows_work = False
                warnings.warn(
                    f"{type(recorder.model).__name__} does not run on a part of the rows of its inputs "
                    f"({reason}): every refresh takes the whole "
                    "batch from now on. Pass fraction=1.0 to mean it",
                    SophiaWarning,
                )
            for parameter in parameters:
                parameter.grad = None
            batches = choose(recorder, fraction=self.fraction, key=key, rows_work=False)
            return self._estimate(batches, parameters, seed=seed, step=step)

    def _estimate(self, batches: list[Replay], parameters: list[Tensor], *, seed: int, step: int) -> Estimate:
        count = sum_count(sum(batch.count for batch in batches), parameters[0].device, self.group)
        if count == 0:
            return Estimate([None] * len(parameters), 0.0)
        return self.estimator.estimate(self._context(parameters, batches, count, (seed, step)))

    @contextmanager
    def by_hand(
        self, model: nn.Module | None, parameters: list[Tensor], *, seed: int, step: int
    ) -> Iterator[PassByHand]:
        """Hand out the estimator's handle inside the sandbox; call its ``finish`` before leaving the
        block.
        """
        with sandbox(model, parameters, seed=seed_for(seed, step, rank(self.group), "dropout")):
            yield self.estimator.by_hand(self._context(parameters, [], 0.0, (seed, step)))

    def _context(
        self, parameters: list[Tensor], batches: Sequence[Replay], count: float, key: tuple[int, ...]
    ) -> PassContext:
        device = parameters[0].device

        def summed(tensors: Diagonals) -> Diagonals:
            return sum_tensors(tensors, parameters, self.group)

        def shared(purpose: str) -> torch.Generator:
            return generator(device, *key, purpose)

        return PassContext(parameters, batches, count, shared, rank(self.group), summed)

    def objection(self, estimate: Estimate, device: torch.device) -> str | None:
        """Why an estimate must not enter h, or None. One synchronisation with the device a refresh."""
        if estimate.count == 0:
            return "no prediction was counted (every label masked?)"
        largest = [
            torch.linalg.vector_norm(d, torch.inf) for d in estimate.diagonal if d is not None and d.numel()
        ]
        top = (
            torch.stack([norm.to(device, torch.float32) for norm in largest]).amax()
            if largest
            else torch.zeros(())
        )
        finite, zero = (bool(flag) for flag in torch.stack([top.isfinite(), top == 0]).tolist())
        if any_rank(not finite, device, self.group):
            return "it is not finite (an overflow, or NaN in the weights)"
        if any_rank(zero, device, self.group):
            return "it is zero everywhere (logits detached from the parameters?)"
        return None


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
