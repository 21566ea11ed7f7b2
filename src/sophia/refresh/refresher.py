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
from sophia.distributed.agreement import Agreement
from sophia.distributed.collectives import Ranks
from sophia.distributed.process_groups import ranks_of
from sophia.distributed.shards import is_dtensor, local
from sophia.distributed.wrappers import reducing
from sophia.refresh.account import Account, account_of
from sophia.refresh.computed_reading import read_computed
from sophia.refresh.cuts import Cuts
from sophia.refresh.gradient_scale import factor_of, grad_scaler, measured
from sophia.refresh.misread import Misread
from sophia.refresh.module_search import Search
from sophia.refresh.proof import prove
from sophia.refresh.recorder import Recorder
from sophia.refresh.refusals import check_ownership, check_recorded
from sophia.refresh.replay import Choice, Replay, RowsCannotBeTaken, choose, usable
from sophia.refresh.sandbox import sandbox
from sophia.refresh.seeds import generator, seed_for
from sophia.refresh.unseen import find_unseen

_OFTEN = 5

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
        batch_dim: dimension of the rows in the outputs; None to find it.
        group: process group whose ranks train the same parameters; None for the default one, False for none.
    """

    def __init__(
        self, estimator: Estimator, *, fraction: float, batch_dim: int | None = None, group: Any
    ) -> None:
        self.estimator, self.fraction, self.group = estimator, fraction, group
        self._misread = Misread()
        self.cuts = Cuts(fraction=fraction, batch_dim=batch_dim)
        self.gradient_scale = self.share = 0.0
        """Of ``.grad`` at the last due step, in units of the loss that h is the curvature of, 0 if it is no
        single factor; and the predictions that the pass counted, over those of the whole step.
        """
        self.weights_equal = False
        """Whether a sample of the predictions may be read next time."""
        self.accounts: list[Account] | None = None
        """What each refresh has found, where somebody has put a list here to be told."""
        self._nothing = 0  # passes in a row of which nothing arrived in the parameters
        self._said: set[str] = set()

    def replay(
        self,
        recorder: Recorder,
        parameters: list[Tensor],
        *,
        seed: int,
        step: int,
        search: Search | None = None,
    ) -> Estimate:
        """Estimate the curvature from the recorded forwards; ``search``, if there is one, has found their
        module.

        Raises:
            RuntimeError: no forward was recorded, inputs were overwritten, or the parameters are no longer
            the model's.
        """
        self.check_estimator(parameters)
        ranks = self.ranks(recorder.model, parameters)
        # Before the sandbox puts the gradients aside. Summed, as a rank's shards may be empty.
        scale = measured(*(ranks.total(product) for product in recorder.arrivals.scale.products()))
        key = (seed, step, ranks.number)

        def chosen() -> Choice:
            return choose(recorder, fraction=self.fraction, key=key, division=division)

        # Before the sandbox, which refuses the hooks that such wrappers put on the model's own parameters.
        ranks.together(lambda: check_ownership(parameters, recorder.model))
        dropout, moving = seed_for(*key, "dropout"), recorder.witnesses.moving
        with (
            sandbox(recorder.model, parameters, seed=dropout, moving=moving),
            reducing(recorder.model),
        ):
            ranks.together(lambda: self._check_recorded(recorder, step, search))
            find_unseen(recorder, usable(recorder), ranks)
            ranks.together(lambda: self._check_outputs(recorder))
            self.weights_equal = not ranks.any_of(not recorder.weights_are_equal())[0]
            for what, words in prove(recorder, parameters, ranks):
                self._say(what, words)
            division = self.cuts.division(recorder, ranks, key)
            while True:
                # All ranks choose before any runs: an error in the choice is raised on all, and none is left
                # waiting in a collective of the pass.
                choice = ranks.together(chosen)
                ranks.check_same(parameters)
                # The count is known before the pass, so that the sum of the losses is divided by sqrt(B) at
                # once and fits in half precision.
                totals = [ranks.total(total) for total in choice.totals]
                if sum(totals) == 0:
                    return Estimate([None] * len(parameters), 0.0)
                factor = self._factor(choice, scale, ranks)
                of_heads = zip(*(replay.counts for replay in choice.replays), strict=True)
                counts = [ranks.total(sum(of_head)) for of_head in of_heads]
                self.share = sum(counts) / sum(totals)
                agreement = Agreement(ranks, RowsCannotBeTaken)
                try:
                    with agreement:
                        context = self._context(
                            parameters, choice.replays, counts, totals, factor, (seed, step), agreement
                        )
                        estimate = self.estimator.estimate(context)
                        self._misread.begun = True
                        self._account(recorder, choice, parameters)
                        return estimate
                except RowsCannotBeTaken as reason:  # on all ranks, or on none
                    division = None
                    self.cuts.give_up(recorder, str(reason))
                # What a pass that was given up left there must not enter the next one.
                for parameter in parameters:
                    parameter.grad = None

    def _check_recorded(self, recorder: Recorder, step: int, search: Search | None) -> None:
        """Raise RuntimeError where nothing was recorded that can be run again."""
        if search is not None:
            search.check()
        check_recorded(recorder, step)
        usable(recorder)

    def _check_outputs(self, recorder: Recorder) -> None:
        """Raise RuntimeError where there is nothing of which h could be made."""
        recordings = usable(recorder)
        for recording in recordings:
            read_computed(recorder, recording)
        recorder.other_outputs.settle(recordings)
        if self.estimator.needs_outputs:
            self._misread.check(recordings, type(recorder.model).__name__)

    def _account(self, recorder: Recorder, choice: Choice, parameters: Sequence[Tensor]) -> None:
        if self.accounts is not None:
            made = account_of(
                recorder,
                self.cuts,
                choice,
                parameters,
                share=self.share,
                gradient_scale=self.gradient_scale,
                needs_outputs=self.estimator.needs_outputs,
            )
            self.accounts.append(made)

    def _factor(self, choice: Choice, scale: float | None, ranks: Ranks) -> float:
        """From the weights that were read to those of the gradient in ``.grad``: its mean over the ranks, and
        what was done to it since the backward.
        """
        whole = ranks.total(sum(weight for weight in choice.weights if weight is not None)) / ranks.divisor
        factor = factor_of(scale, whole, grad_scaler(), micro_batches=choice.micro_batches)
        self.gradient_scale = 0.0 if scale is None else scale / factor
        return factor / ranks.divisor

    def _say(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, SophiaWarning)

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
        agreement = Agreement(ranks, RowsCannotBeTaken)
        dropout = seed_for(seed, step, ranks.number, "dropout")
        # The user may go through a DDP wrapper here, whose buckets share memory with the gradients in .grad.
        copies = bool(ranks.data)
        # His hooks run, as in any backward of his: some add up over ranks what no wrapper does.
        protected = sandbox(model, parameters, seed=dropout, copies=copies, tensor_hooks=True)
        with protected, reducing(model), agreement:
            yield self.estimator.by_hand(self._context(parameters, [], [], [], 1.0, (seed, step), agreement))

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
        totals: Sequence[float],
        factor: float,
        key: tuple[int, ...],
        agreement: Agreement,
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
        return PassContext(
            parameters,
            batches,
            count,
            shared,
            ranks.number,
            summed,
            counted,
            counts,
            totals,
            factor,
        )

    def examined(
        self, estimate: Estimate, device: torch.device, ranks: Ranks
    ) -> tuple[str | None, str | None]:
        """Why an estimate must not enter h, and what is to be said of one that does; None for nothing.

        Both are the same on all ranks, and cost one synchronisation with the device. No estimate is refused
        for its value: one that is zero may be zero by right (labels of which the model is sure), and without
        these zeros the average would be too large.
        """
        if estimate.count == 0:
            return "no prediction was counted (every label masked?)", None
        reached = [local(d) for d in estimate.diagonal if d is not None]
        # Lowest and highest hand NaN on, and cost a thirtieth of an infinity norm on a CPU.
        ends = [
            end.to(device, torch.float32).abs()
            for part in reached
            if part.numel()
            for end in torch.aminmax(part)
        ]
        top = torch.stack(ends).amax() if ends else torch.zeros(())
        finite, zero = (bool(flag) for flag in torch.stack([top.isfinite(), top == 0]).tolist())
        infinite, arrived, drawn, anything = ranks.any_of(not finite, bool(reached), estimate.drawn, not zero)
        if infinite:
            return "it is not finite (an overflow, or NaN in the weights)", None
        if not arrived:
            return "no gradient of the sampled loss reached a parameter (are the logits detached?)", None
        # Gradients of a few predictions may cancel by chance; again and again they do not.
        self._nothing = self._nothing + 1 if drawn and not anything else 0
        if self._nothing < _OFTEN:
            return None, None
        return None, (
            f"in {_OFTEN} passes the sampled loss had a gradient in the outputs, but none in any parameter: "
            "the outputs do not depend on them (a factor of zero?). h averages zeros, and they move by sign "
            "momentum"
        )
