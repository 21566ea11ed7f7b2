"""``class Sophia``: parameter groups, counters, refreshes. The mathematics is in ``update_rule.py``.

Over 350 lines because an optimizer of torch is one class: arguments and their documentation, the attached
model, step, refresh, statistics, groups and state dict.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Never, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports

from sophia.checks import SophiaWarning, check_batch_dim, check_fraction, check_gradient, check_option
from sophia.curvature import Estimator, GaussNewtonBartlett, agreed_likelihood, estimator_named
from sophia.curvature.estimate import Estimate, PassByHand
from sophia.diagnostics import describe
from sophia.distributed.shards import first_element, local
from sophia.distributed.wrappers import unwrapped
from sophia.likelihoods import Heads, Likelihood, likelihood_named
from sophia.refresh.gradient_scale import FAR, words
from sophia.refresh.module_search import Search
from sophia.refresh.owners import name_of, owners_of, tensors_given
from sophia.refresh.ownership import Orphans, in_no_group, nothing_to_train
from sophia.refresh.recorder import Recorder
from sophia.refresh.refresher import Refresher, is_due, staleness
from sophia.refresh.refusals import check_ownership
from sophia.refresh.sampled_reading import ALL_AGAIN
from sophia.refresh.seeds import seed_for
from sophia.step.adamw_arguments import adamws_betas_and_eps, taken_by_position
from sophia.step.dispatch import Work, current_gamma, work_of
from sophia.step.groups import COUNTERS, check_group, decayed_and_not, translated_from_adamw
from sophia.step.hidden_matrices import (
    groups_by_kind,
    model_that_tells_kinds,
    move_by_kind,
    rule_of,
    rules_of,
)
from sophia.step.kernels.average_curvature import average
from sophia.step.named_groups import groups_by_name
from sophia.step.rounding import key_of_parameter, moved
from sophia.step.rules import PAPER, RULES
from sophia.step.state import (
    RMS,
    add_what_is_missing,
    check_origin,
    is_complete,
    other_settings,
    restore_state,
)
from sophia.step.whole_tensors import check_whole, rms_of_whole_tensors

__all__ = ["Sophia"]


class Sophia(torch.optim.Optimizer):
    r"""Sophia (arXiv 2305.14342v4, Algorithm 3) as a drop-in for ``AdamW``.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        h \leftarrow \beta_2 h + (1 - \beta_2) \hat h \text{ every } k \text{ steps}, \\
        \theta &\leftarrow (1 - \eta\lambda)\theta - \eta \, \mathrm{clip}(m / \max(\gamma h, \epsilon), 1)

    ``step()`` renews h by itself: on every k-th step it runs a part of the recorded training forwards again,
    with labels drawn from the model, in a sandbox that leaves ``.grad``, buffers and random generators as
    they were. The loop needs no other change.

    Args:
        model_or_params: the model (matrices are decayed, vectors are not), or parameters, groups or named
            parameters as for any optimizer of torch (decayed as there: all of a group).
        lr: the largest move of a coordinate in one step (decay aside), in the units of AdamW's: half of
            AdamW's tuned value for the published rule, the whole for ``"damped"``; for the rules without
            curvature, whose steps have a size in the mean, four times it (``from_adamw``).
        betas: decay of m a step, and of h a refresh, or of second moments a step. None: the paper's (0.96,
            0.99), (0.9, 0.9) for the other rules, (0.8, 0.95) for ``"factored"``.
        gamma: scale of h in the denominator; larger means fewer clipped coordinates. The official
            repository calls it rho. None: 0.05, and 0.2 for ``"damped"``. Rules without curvature have none.
        eps: floor of the denominator ``gamma h``; above 0. None: 1e-12; 1e-8, Adam's, without curvature.
        weight_decay: decoupled, times lr.
        model: the module whose training forwards are recorded: the one that is really called and returns
            logits. None: of the modules that own the parameters, the outermost that is called in training.
        rule: ``"paper"``: Algorithm 3, or one of our own (equations in ``sophia.update_rule``, measurements
            in docs/research.md): ``"damped"``, element by element with the same buffers; or without
            curvature, from second moments of the gradients, so that nothing is refreshed: ``"spectral"`` and
            ``"whitened"``, which bound the singular values of the steps of hidden matrices and need them
            whole, no shards; ``"factored"`` moves what is no hidden matrix there.
        damping: floor of ``gamma h`` in units of the rms of the tensor's momentum; not for ``"paper"``. For
            ``"whitened"`` and ``"factored"`` (which moves the rest under ``"spectral"`` too) what is added to
            eigenvalues, in units of their mean, at most 0.1. None: the rule's own.
        update_every: k, steps between two refreshes, or two decompositions without curvature. None: 10; 5.
        fraction: share of the micro-batches (of the rows, if there is one micro-batch) that a refresh uses,
            at least one. The paper takes a half; an eighth trained no worse, at a quarter of the cost
            (``sophia experiment fraction``).
        batch_dim: dimension of the outputs along which the rows lie. None: the first or, with time first, the
            second. Rows are run alone only if a run shows that they are independent.
        estimator: ``"gnb"``, ``"hutchinson"``, ``"empirical_fisher"`` or a ``sophia.curvature.Estimator``.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, ``"poisson"``, a
            ``sophia.likelihoods.Likelihood``, or ``sophia.likelihoods.Heads`` for several outputs.
        mode: ``"replay"``, or ``"manual"``: h is renewed by ``with opt.hessian_pass()`` alone.
        seed: of the noise of the refreshes, which is a function of (seed, step, rank, micro-batch).
        logits_fn: from the model's output to the logits, where they are not found; a mapping by name for
            several outputs, as with ``mask_fn``.
        mask_fn: ``mask_fn(args, kwargs, output)``, a bool mask of the predictions that count, where the
            gradient does not tell; or numbers, what each weighs in ``(weights * losses).mean()``.
        copy_inputs: keep copies of the model's inputs on due steps, for loops that overwrite them.
        process_group: ranks that train the same parameters on other data, or a device mesh of them; None for
            the wrapper's or else the default group, False for this process alone.
        state_dtype: of m and h: float32, float64, or bfloat16, which halves them and is rounded
            stochastically. Float64 parameters have float64 state.
        stochastic_rounding: round parameters in bfloat16 up or down by chance, so that steps below their
            precision are right in the mean instead of lost; other parameters are not touched by it.
        maximize: as in ``torch.optim.AdamW``.
        foreach: as there; None chooses.
        fused: as there: one compiled pass on a CPU; None chooses.
        capturable: as there; the refresh itself is not captured.
        differentiable: as there.

    Two buffers a parameter, ``state[p]["exp_avg"]`` (m) and ``state[p]["hessian"]`` (h, already times the
    count B); for a tensor under the damped rule one number more, ``state[p]["momentum_rms"]``. A rule without
    curvature has no h: the spectral one has m alone; the others have beside it two square matrices of a
    matrix's short side, ``"second_moment"`` and its eigenvectors, ``"basis"``, and what they keep along them
    (docs/glossary.md).

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    >>> opt = Sophia(model, lr=1e-2)
    >>> x, y = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4])
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     opt.step()
    >>> opt.stats()["refreshes"], opt.stats()["B"]          # step 0 refreshed h, from one of the four rows
    (1.0, 1.0)
    """

    _constructing = False
    _is_copy = False
    """A copy, or unpickled: its model is named by ``attach`` and not looked for."""

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float | Tensor = 6e-4,
        *by_position: Never,
        betas: tuple[float, float] | None = None,
        gamma: float | None = None,
        eps: float | None = None,
        weight_decay: float = 0.1,
        model: nn.Module | None = None,
        rule: str = "paper",
        damping: float | None = None,
        update_every: int | None = None,
        fraction: float = 1 / 8,
        batch_dim: int | None = None,
        estimator: str | Estimator = "gnb",
        likelihood: str | Likelihood | Heads = "categorical",
        mode: str = "replay",
        seed: int = 0,
        logits_fn: Callable[[Any], Any] | None = None,
        mask_fn: Callable[[tuple[Any, ...], Mapping[str, Any], Any], Any] | None = None,
        copy_inputs: bool = False,
        process_group: Any = None,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if by_position:
            raise TypeError(taken_by_position(lr, by_position))
        check_option("mode", mode, ("replay", "manual"))
        check_option("rule", rule, tuple(RULES))
        by = RULES[rule]
        named = {"betas": betas, "eps": eps, "gamma": gamma, "damping": damping, "update_every": update_every}
        # Of a group with a rule of its own they are that rule's; see ``add_param_group``.
        self._ungiven = tuple(name for name, value in named.items() if value is None)
        betas = by.betas if betas is None else betas
        damping = by.damping if damping is None else damping
        eps = by.eps if eps is None else eps
        update_every = by.update_every if update_every is None else update_every
        # Not float16: an h of 1e-8 would be zero in it.
        check_option("state_dtype", state_dtype, (torch.float32, torch.float64, torch.bfloat16))
        check_fraction(fraction)
        check_batch_dim(batch_dim)
        if isinstance(model_or_params, nn.Module):
            if model is not None and model is not model_or_params:
                raise ValueError(
                    "Sophia got two models: pass Sophia(model, ...) or Sophia(params, model=model, ...)"
                )
            model = model_or_params
            params: Any = decayed_and_not(model, weight_decay)
        else:
            params = model_or_params
        owners: list[nn.Module] = []
        if model is None and mode == "replay":
            params, tensors = tensors_given(params)
            owners = owners_of(tensors) if tensors else []  # torch has words for no parameters
        if isinstance(params, Iterable) and not isinstance(params, (Tensor, Mapping, str)):
            params = list(params)
        if gamma is not None and not any(rule.has_curvature for rule in rules_of(params, by)):
            raise ValueError(
                f"gamma={gamma!r} with rule={rule!r}: that rule has no curvature for gamma to scale, so it "
                "would have no effect. Leave it out, or use rule='damped'"
            )
        if move_by_kind(params, by):
            if model is None and mode == "manual":
                raise ValueError(
                    f"rule={rule!r}, or that of a group, tells hidden matrices from embeddings and the head "
                    "by the model: pass Sophia(model, ...) or Sophia(params, model=model, ...)"
                )
            telling = model if model is not None else model_that_tells_kinds(owners, tensors)
            params = params if telling is None else groups_by_kind(params, telling, by)
        gamma = by.gamma if gamma is None else gamma
        self.mode, self.fraction, self.batch_dim = mode, fraction, batch_dim
        self.state_dtype, self.stochastic_rounding = state_dtype, stochastic_rounding
        self.likelihood = likelihood_named(likelihood)
        self.estimator = estimator_named(estimator, self.likelihood)
        if isinstance(self.estimator, GaussNewtonBartlett):
            self.likelihood = agreed_likelihood(self.estimator.likelihood, self.likelihood, likelihood)
        self.logits_fn, self.mask_fn, self.copy_inputs, self.process_group = (
            logits_fn,
            mask_fn,
            copy_inputs,
            process_group,
        )
        self._ready()
        self._say_if_adamws({"rule": rule, **named})
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "rule": rule,
            "damping": damping,
            "scale": 1.0,
            "update_every": update_every,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "seed": seed,
            **COUNTERS,
        }
        check_group(defaults, rounds=self._rounds)
        self._constructing = True
        super().__init__(params, defaults)
        self._constructing = False
        if model is not None:
            self.attach(model)
        elif owners and any(map(_has_curvature, self.param_groups)):
            self._begin_search(owners)
        self._say_what_has_no_effect(estimator=estimator, likelihood=likelihood, fraction=fraction)

    @classmethod
    def from_adamw(
        cls,
        source: torch.optim.Optimizer | Mapping[str, Any],
        model: nn.Module | None = None,
        *,
        lr_ratio: float | None = None,
        **settings: Any,
    ) -> Sophia:
        """Sophia in place of an AdamW that you have tuned: lr times ``lr_ratio``, weight decay divided by it.

        The product lr * weight_decay, which is what decays the weights, stays the same. Half of AdamW's tuned
        lr is where sweeps of 130M to 520M models found the published rule's (arXiv 2509.02046; there with
        twice AdamW's warm-up); batches of a few thousand tokens may want a third. ``rule="damped"`` takes
        AdamW's lr as it is, the rules without curvature four times it: so they were ahead of the AdamW itself
        without a search (docs/research.md). AdamW's betas and eps are not taken over, as they mean something
        else or are that rule's own, and neither is its state.

        Args:
            source: the optimizer, whose groups are kept, or its arguments
                (``{"lr": ..., "weight_decay": ...}``).
            model: the module that is called in the loop; without it that is found by the optimizer's
                parameters.
            lr_ratio: Sophia's lr over AdamW's. None: 0.5 for the published rule, 1 for ``"damped"``, 4 for
                the rules without curvature.
            **settings: any other argument of ``Sophia``, ``rule`` among them.

        >>> model = nn.Linear(3, 4)
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)
        >>> group = Sophia.from_adamw(adamw, model).param_groups[0]
        >>> group["lr"], group["weight_decay"]
        (0.0003, 0.2)
        >>> group = Sophia.from_adamw(adamw, model, rule="damped").param_groups[0]
        >>> group["lr"], group["weight_decay"]
        (0.0006, 0.1)
        """
        if lr_ratio is None:
            rule = settings.get("rule", "paper")
            check_option("rule", rule, tuple(RULES))
            lr_ratio = RULES[rule].lr_over_adamw
        groups, defaults = translated_from_adamw(source, lr_ratio)
        if groups is None:
            if model is None:
                raise TypeError(
                    "from_adamw got the arguments of an optimizer, and neither parameters nor a model: write "
                    "Sophia.from_adamw({...}, model)"
                )
            return cls(model, **{**defaults, **settings})
        return cls(groups, model=model, **{**defaults, **settings})

    @staticmethod
    def groups(
        model: nn.Module, patterns: Mapping[str, Mapping[str, Any]], *, weight_decay: float = 0.1
    ) -> list[dict[str, Any]]:
        """Parameter groups by patterns of names, for ``Sophia(groups, ...)``; the rest is as in
        ``Sophia(model)``.

        Args:
            model: whose parameters, of which each falls to the first pattern that matches its name.
            patterns: settings of a group (lr, gamma, weight_decay, rule, ...) by pattern, as in a shell:
                ``"*embed*"``, ``"blocks.[01].*"``. A tied parameter has several names.
            weight_decay: of matrices; vectors are not decayed. Where a pattern gives its own, that is for all
                that it matches.

        Raises:
            ValueError: a pattern or a setting that would have no effect.

        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> groups = Sophia.groups(model, {"0.*": {"lr": 1e-4}}, weight_decay=0.2)
        >>> opt = Sophia(groups, lr=3e-4)
        >>> [(g["param_names"], g["lr"], g["weight_decay"]) for g in opt.param_groups]
        [(['0.weight'], 0.0001, 0.2), (['1.weight'], 0.0003, 0.2), (['1.bias'], 0.0003, 0.0)]
        """
        return groups_by_name(model, patterns, weight_decay)

    def _ready(self) -> None:
        """Set what is neither a setting nor state: it is made anew in a copy."""
        self._refresher = Refresher(
            self.estimator, fraction=self.fraction, batch_dim=self.batch_dim, group=self.process_group
        )
        self._recorder: Recorder | None = None
        self._model: nn.Module | None = None
        self._search: Search | None = None  # for the model, until the first refresh
        self._was_found = False
        self._warned: set[str] = set()
        self._reached: set[int] = set()  # parameters that a pass has come to, by id
        self._orphans = Orphans()
        self._joins = False  # whether the step has shards whose rms is that of whole tensors

    # ---- the model ----

    def attach(self, model: nn.Module) -> None:
        """Record the training forwards of ``model`` from now on, and of no other. Call it again after
        wrapping or loading. With ``mode='manual'`` nothing is recorded; its wrappers are known then.

        Raises:
            RuntimeError: some of the optimizer's parameters are not the model's.
        """
        inner, group = unwrapped(model)
        if self.mode == "replay":
            check_ownership(self._trained() or self._parameters(), inner)
        self.detach()
        self._take_model(inner, group)

    def _take_model(self, inner: nn.Module, group: Any, recorder: Recorder | None = None) -> None:
        self._model = inner
        self._refresher.group = group if self.process_group is None else self.process_group
        if self.mode == "replay" and any(map(_has_curvature, self.param_groups)):
            self._recorder = self._recorder_of(inner) if recorder is None else recorder
            self._recorder.hook()
            self._listen()

    def _recorder_of(self, model: nn.Module) -> Recorder:
        return Recorder(
            model,
            self.likelihood,
            logits_fn=self.logits_fn,
            mask_fn=self.mask_fn,
            copy_inputs=self.copy_inputs,
            needs_outputs=self.estimator.needs_outputs,
        )

    def _found(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the forwards of a module that owns the parameters, from the one on that begins now."""
        inner, group = unwrapped(module)
        if self._search is None or inner is self._model:
            return
        check_ownership(self._trained() or self._parameters(), inner)
        self._take_model(inner, group, self._search.exchange(self._recorder, inner, group))
        self._was_found = True
        _log.info(
            "Sophia records the training forwards of %s, found by its parameters: of the modules that own "
            "them (%s) it was called",
            name_of(inner),
            self._search,
        )
        if inner is module and self._recorder is not None:
            self._recorder.before(inner, args, dict(kwargs))

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._end_search()
        if self._recorder is not None:
            self._recorder.detach()
        self._recorder = self._model = None
        self._was_found = False

    def _begin_search(self, owners: list[nn.Module]) -> None:
        self._end_search()
        self._search = Search(owners, self._found)

    def _end_search(self) -> None:
        if self._search is not None:
            self._search.end()
        self._search = None

    def _listen(self) -> None:
        if self._recorder is not None:
            self._recorder.active = any(
                _renews(g) and is_due(g["step"], g["update_every"]) for g in self.param_groups
            )
            first = self.param_groups[0]
            sampled = first["weights_equal"] and self._refreshed()["refreshes"] % ALL_AGAIN
            self._recorder.sample = (first["seed"], first["step"]) if sampled else None
            self._recorder.maximize = all(g["maximize"] for g in self.param_groups)

    # ---- the step ----

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; refresh h first if it is due.

        Args:
            closure: re-evaluates the model and returns the loss; optional, called once, with gradients on.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError: a refresh is due and cannot be done, or a gradient is sparse or complex. Nothing has
            moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Under torch.compile the arithmetic alone is in the graph: counters and refresh change what a
        # graph would bake in. (And a dict with tensors as keys, which torch.optim's state is, is traced
        # wrongly: all parameters would have the state of one.)
        for work in self._prepared(torch.compiler.is_compiling()):
            with torch.set_grad_enabled(work.differentiable):
                if work.stays_out_of_graphs:
                    _step_outside_of_graphs(work)
                else:
                    work.do()
        if self._joins:
            self._join_shards(first=False)
        return loss

    @untraced
    def _prepared(self, compiling: bool) -> list[Work]:
        """Refresh h if it is due and update the counters; return what is left to do, as lists for kernels.

        Nothing for the call with which ``torch.distributed.checkpoint`` asks for empty state.
        """
        # Every check comes before anything moves: an error here leaves weights, m and h as they were.
        self._joins = False
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    check_gradient(gradient)
                    self._joins |= check_whole(parameter, group)
        if self._is_asked_for_empty_state():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._state_of(parameter, group)
            self._joins = False  # not every rank need ask
            return []
        # Before the step, as in Algorithm 3: the step uses the h of its own weights.
        with torch.no_grad():
            if self.mode == "replay":
                self._refresh_if_due()
        if self._trained():
            for group in filter(_renews, self.param_groups):  # all first: a warning may be an error
                self._warn_if_stale(group)
        if self._joins:
            self._join_shards(first=True)
        work = [
            part
            for group in self.param_groups
            for part in work_of(
                group,
                self._state_of,
                compiling=compiling,
                keys=self._keys("step", group),
                stochastic=self.stochastic_rounding,
            )
        ]
        # After the lists are made: noise, corrections and refresh of this step go by its number from 0. The
        # recorder then listens only if the coming step is due.
        for group in self.param_groups:
            group["step"] += 1
        self._listen()
        return work

    @untraced
    def _join_shards(self, *, first: bool) -> None:
        with torch.no_grad():
            rms_of_whole_tensors(self.param_groups, self._state_of, first=first)

    def _is_asked_for_empty_state(self) -> bool:
        """Whether ``torch.distributed.checkpoint`` calls: it wants state to load into, and makes it by a step
        with lr = 0 and zero gradients for the parameters that have none, all of them (torch to 2.14) or those
        that were unfrozen since. Read from this rank's shards, which may be empty, and no collective: one
        rank may ask alone. So a training forward, which is every rank's, outweighs gradients of zero.
        """
        rates = [group["lr"] for group in self.param_groups]
        if any(lr != 0 for lr in rates if not isinstance(lr, Tensor)):
            return False
        if self._recorder is not None and self._recorder.counts():
            return False
        asked = [p for p in self._parameters() if p.grad is not None]
        if not asked or any(self.state.get(p) for p in asked):
            return False
        # After what may end it: to read a tensor waits for its device, which no captured step may do.
        if any(_number(lr) != 0 for lr in rates):
            return False
        return not any(bool(local(p.grad).any()) for p in asked if p.grad is not None)

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; also forgets recorded forwards whose gradients go with it (a step that a scaler
        skipped).
        """
        if self._recorder is not None:
            self._recorder.forget_reached()
        if self._search is not None:
            self._search.forget(reached=True)
        super().zero_grad(set_to_none)

    # ---- the curvature ----

    def _refresh_if_due(self) -> None:
        due = [
            g
            for g in self.param_groups
            if _has_curvature(g) and is_due(g["step"], g["update_every"]) and g["refreshed"] != g["step"]
        ]
        # With what has curvature frozen, and the rest not, there is nothing to renew.
        if due and self._something_trains() and self._with_curvature():
            if self._search is not None and self._recorder is not None:
                trained, ranks = self._search.trained(self._recorder)
                if trained is not self._recorder:
                    self._search.exchange(self._recorder, trained.model, ranks)
                    self._take_model(trained.model, ranks, trained)
            recorder = self._recorder or self._stand_in()
            if recorder is None and self._model is not None:
                raise RuntimeError(
                    f"a Hessian refresh is due at step {due[0]['step']}, but no parameter had curvature when "
                    "the model was attached, so that its forwards were not recorded: call opt.attach(model) "
                    "when a group gets such a rule"
                )
            if recorder is None:
                gone = (
                    "no model is attached (a copy or an unpickled optimizer has none): call opt.attach(model)"
                    if self._search is None
                    else "the module that owned the parameters is gone (rebuilt, or deleted): build the "
                    "optimizer from the model that is trained now"
                )
                raise RuntimeError(f"a Hessian refresh is due at step {due[0]['step']}, but {gone}")
            first = self.param_groups[0]
            estimate = self._refresher.replay(
                recorder, self._with_curvature(), seed=first["seed"], step=first["step"], search=self._search
            )
            self._end_search()
            first["share"], first["gradient_scale"] = self._refresher.share, self._refresher.gradient_scale
            first["weights_equal"] = int(self._refresher.weights_equal)
            if not 1 / FAR < (first["gradient_scale"] or 1.0) < FAR:
                self._warn_once("gradient scale", words(first["gradient_scale"]))
            self._take(estimate, due)
            if names := self._orphans.left_alone(recorder.model, self._parameters()):
                self._warn_once("in no group", in_no_group(names))
        self._forget()

    def _stand_in(self) -> Recorder | None:
        """A recorder of nothing, where the search has found no module: its error is one of all ranks."""
        outermost = None if self._search is None else self._search.stand_in()
        if outermost is None:
            return None
        inner, group = unwrapped(outermost)
        self._refresher.group = group if self.process_group is None else self.process_group
        recorder = self._recorder_of(inner)
        recorder.detach()
        return recorder

    def _forget(self) -> None:
        if self._recorder is not None:
            self._recorder.forget()
        if self._search is not None:
            self._search.forget()

    def _something_trains(self) -> bool:
        """Whether a parameter is not frozen, before anything asks the model for their curvature."""
        if self._trained():
            return True
        parameters, ours = self._parameters(), {id(p) for p in self._parameters()}
        named = () if self._model is None else self._model.named_parameters()
        others = [name for name, p in named if p.grad is not None and id(p) not in ours]
        self._warn_once("frozen", nothing_to_train(len(parameters), others))
        return False

    @contextmanager
    def hessian_pass(self) -> Iterator[PassByHand]:
        """Refresh h by hand: any number of micro-batches, in any loop.

            with opt.hessian_pass() as hp:
                for x, mask in micro_batches:
                    hp.sampled_loss(model(x), mask).backward()

        ``hp.sampled_loss(logits, mask=None)`` is for Gauss-Newton-Bartlett; Hutchinson and the empirical
        Fisher have ``hp.add(loss, count)`` with the mean loss over ``count`` predictions. The training
        gradients in ``.grad``, buffers and random generators are as before afterwards. h changes when the
        block ends, and not at all if it raises.
        """
        if not any(map(_has_curvature, self.param_groups)) or (
            self._trained() and not self._with_curvature()
        ):
            raise RuntimeError(
                f"hessian_pass: with rule={self.defaults['rule']!r} nothing that trains here has curvature, "
                "so there is nothing to refresh. Leave the pass out, or take another rule"
            )
        first = self.param_groups[0]
        with self._refresher.by_hand(
            self._model, self._with_curvature() or self._parameters(), seed=first["seed"], step=first["step"]
        ) as handle:
            yield handle
            estimate = handle.finish()
        with torch.no_grad():
            self._take(estimate, list(filter(_has_curvature, self.param_groups)))

    def _take(self, estimate: Estimate, groups: list[dict[str, Any]]) -> None:
        """Average an estimate into h, unless something is wrong with it: then it is skipped, counted and
        said.
        """
        parameters = self._with_curvature() or self._parameters()
        self.param_groups[0]["counted"] = estimate.count
        ranks = self._refresher.ranks(self._model, parameters)
        objection, remark = self._refresher.examined(estimate, parameters[0].device, ranks)
        if objection is not None:
            for group in groups:
                group["skipped"] += 1
            self._warn_once(
                "skipped",
                f"a Hessian pass was skipped at step {groups[0]['step']}: {objection}. h is unchanged; "
                "opt.stats() counts skips",
            )
            return
        if remark is not None:
            self._warn_once("remark", remark)
        # By identity: a tensor's own == compares elements.
        diagonals = {id(p): d for p, d in zip(parameters, estimate.diagonal, strict=True)}
        # Not those that an earlier pass has reached: a layer is left out by chance, or an expert not asked.
        self._reached.update(number for number, diagonal in diagonals.items() if diagonal is not None)
        unreached = [p for p in parameters if id(p) not in self._reached and p.grad is not None]
        if unreached:
            self._warn_once(
                "unreached",
                f"{len(unreached)} of {len(parameters)} parameters have a training gradient but none in the "
                f"Hessian pass (shapes {[tuple(p.shape) for p in unreached[:3]]}): the logits of the rows "
                "that were run again do not depend on them. Either the loss reaches them by another way than "
                "the logits (another output, a penalty), and they move by sign momentum; or this pass left "
                "them out by chance (layer drop, early exit, experts), and others will reach them",
            )
        for group in groups:
            beta2 = float(group["betas"][1])
            keys = self._keys("refresh", group)
            for parameter in group["params"]:
                if id(parameter) not in diagonals:
                    continue  # frozen: no state is made, and what there is stays
                diagonal = diagonals[id(parameter)]  # None: the pass does not reach it, its estimate is zero
                if diagonal is not None:
                    turned = self.estimator.signed and group["maximize"]
                    diagonal = local(diagonal.neg() if turned else diagonal)
                hessian = local(self._state_of(parameter, group)["hessian"])
                average(hessian, diagonal, beta2=beta2, key=keys.get(id(parameter)))
            group["refreshed"] = group["step"]
            group["refreshes"] += 1
        self._warned.discard("stale")

    def _warn_if_stale(self, group: dict[str, Any]) -> None:
        joined = group["joined"]
        message = staleness(
            group["step"] - joined, max(group["refreshed"] - joined, -1), group["update_every"], self.mode
        )
        if message is not None:
            self._warn_once("stale", message)

    def _say_if_adamws(self, named: Mapping[str, Any]) -> None:
        if not RULES[named.get("rule", "paper")].has_curvature:
            return  # its betas are Adam's
        if (message := adamws_betas_and_eps(named)) is not None:
            self._warn_once("adamw", message)

    def _say_what_has_no_effect(self, **settings: Any) -> None:
        """Of curvature, where no group has any."""
        usual = {"estimator": "gnb", "likelihood": "categorical", "fraction": 1 / 8}
        unusual = [f"{name}={value!r}" for name, value in settings.items() if value != usual[name]]
        unusual += [n for n in ("logits_fn", "mask_fn", "batch_dim") if getattr(self, n) is not None]
        if unusual and not any(map(_has_curvature, self.param_groups)):
            self._warn_once(
                "no effect",
                f"{', '.join(unusual)} has no effect: it is about the curvature, and rule="
                f"{self.defaults['rule']!r} has none. Leave it out, or take another rule",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, SophiaWarning)

    def stats(self, *, all_ranks: bool = False) -> dict[str, float]:
        """Numbers for a log, names stable; costs a few passes over the state, so call it when you log.

        Shares and quantiles are those of the coordinates that this rank holds: of all of them without
        sharding. ``all_ranks=True`` takes them over the whole of a sharded model, on every rank; then every
        rank must call, as the ranks wait for each other. That is why it is not the default: logging is often
        done on one rank.

        ``unclipped`` (|m| < gamma h), ``eps_limited`` (gamma h <= eps) and ``h_zero`` are shares of the
        coordinates that have curvature, whatever the rule; ``own_rule`` is the share of all that is not moved
        by the published one, ``has_curvature`` the share whose rule divides by h;
        ``h_q05``, ``h_q50``, ``h_q95`` quantiles of h; ``B`` the predictions counted in the last
        pass, and ``share`` their share of those of the step, in replay; ``gradient_scale`` the scale of
        ``.grad`` in units of the loss that h is the curvature of: 1, less what clipping took, and 0 if it
        could not be measured; ``age`` the steps taken since h was renewed (all steps, if it never was);
        ``refreshes`` and ``skipped`` count passes. ``sophia.diagnostics.advice`` turns them into a sentence.
        """
        parameters = self._parameters()
        ranks = self._refresher.ranks(self._model, parameters) if all_ranks else None
        mine = {id(p) for p in parameters if ranks is None or ranks.answers_for(p)}
        held = [
            (g, [self.state[p] for p in g["params"] if id(p) in mine and self.state.get(p)])
            for g in filter(_has_curvature, self.param_groups)
        ]
        groups = [
            (
                [local(s["exp_avg"]) for s in states],
                [local(s["hessian"]) for s in states],
                current_gamma(g),
                float(g["eps"]),
            )
            for g, states in held
        ]
        first = self.param_groups[0]
        sizes = [
            (RULES[g["rule"]].moving(p), p.numel())
            for g in self.param_groups
            for p in g["params"]
            if p.requires_grad
        ]
        every = sum(size for _, size in sizes) or 1
        return {
            **describe(groups, gather=None if ranks is None or not ranks.everyone else ranks.gather),
            "own_rule": sum(size for rule, size in sizes if rule is not PAPER) / every,
            "has_curvature": sum(size for rule, size in sizes if rule.has_curvature) / every,
            "B": float(first["counted"]),
            "share": float(first["share"]),
            "gradient_scale": float(first["gradient_scale"]),
            "age": float(first["step"] - max(self._refreshed()["refreshed"], 0)),
            "refreshes": float(self._refreshed()["refreshes"]),
            "skipped": float(self._refreshed()["skipped"]),
        }

    # ---- groups and state ----

    @property
    def _rounds(self) -> bool:
        """Whether anything is rounded stochastically."""
        return self.stochastic_rounding or self.state_dtype == torch.bfloat16

    def _keys(self, purpose: str, group: dict[str, Any]) -> dict[int, int]:
        """By id of a parameter, the key of its roundings in this step; empty where nothing is rounded.

        Not the rank's: replicas must stay equal.
        """
        if not self._rounds:
            return {}
        key = seed_for(group["seed"], group["step"], f"rounding, {purpose}")
        numbers = {id(p): number for number, p in enumerate(self._parameters())}
        return {
            id(p): moved(key_of_parameter(key, numbers[id(p)]), first_element(p)) for p in group["params"]
        }

    def __repr__(self) -> str:
        first, line, rest = super().__repr__().partition("\n")
        return f"{first}{self._of_model()}{line}{rest}"

    def _of_model(self) -> str:
        if self.mode == "manual":
            return ""
        if self._model is not None:
            how = "found by its parameters" if self._was_found else "given"
            return f"records {name_of(self._model)}, {how}"
        if self._search is not None:
            return f"will record the first that is called in training of {self._search}"
        return "no model attached"

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _refreshed(self) -> dict[str, Any]:
        """The first group whose counters of refreshes count."""
        return next(filter(_has_curvature, self.param_groups), self.param_groups[0])

    def _with_curvature(self) -> list[Tensor]:
        """What trains by a rule that divides by h."""
        return [p for g in filter(_has_curvature, self.param_groups) for p in g["params"] if p.requires_grad]

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self._parameters() if parameter.requires_grad]

    def _state_of(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state = cast("dict[str, Tensor]", self.state[parameter])
        rule = RULES[group["rule"]]
        # Asked for every tensor at every step: the usual case first. A group may change its rule.
        usual = rule.statistics is None and "hessian" in state and (rule is PAPER or RMS in state)
        if not usual and not is_complete(state, parameter, rule):
            add_what_is_missing(state, parameter, rule, self.state_dtype)
        return state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's settings are checked before anything is added, and it joins at the current
        step. If it has a rule of its own, what neither it nor the optimizer was given is that rule's; under a
        rule that tells kinds of tensors apart it becomes a group for each, unless it names its ``scale``.
        """
        groups = [param_group] if self._constructing else self._by_kind(param_group)
        completed = [self._completed(group) for group in groups]  # all are checked before one is added
        before = len(self.param_groups)
        try:
            for group in completed:
                super().add_param_group(group)
                if any(parameter.is_complex() for parameter in self.param_groups[-1]["params"]):
                    raise ValueError(
                        "Sophia does not support complex parameters: curvature is defined coordinate by "
                        "coordinate. Use torch.view_as_real"
                    )
            if not self._constructing:
                self._look_for_the_model(self.param_groups[before:])
        except ValueError:
            del self.param_groups[before:]
            raise

    def _by_kind(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        by = RULES[self.defaults["rule"]]
        if not move_by_kind([group], by):
            return [group]
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        tensors = [m[1] if isinstance(m, tuple) else m for m in members]
        telling = self._model
        if telling is None and self.mode == "replay":
            every = self._parameters() + tensors
            telling = model_that_tells_kinds(owners_of(every), every)
        known = set() if telling is None else {id(p) for p in telling.parameters()}
        if not known.issuperset(map(id, tensors)):
            raise ValueError(
                f"add_param_group: rule={group.get('rule', by.name)!r} tells hidden matrices from embeddings "
                "and the head by the model, and none is known here that has these parameters. Call "
                "opt.attach(model) first, or give the group a 'scale', of its steps in units of lr"
            )
        assert telling is not None
        return groups_by_kind([{**group, "params": members}], telling, by)

    def _completed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The group with its rule's own settings where nobody gave any, and the counters of the others."""
        by = rule_of(group, RULES[self.defaults["rule"]])
        own = {name: getattr(by, name) for name in self._ungiven}
        check_group({**self.defaults, **own, **group}, rounds=self._rounds)
        self._say_if_adamws({"rule": by.name, **group})
        if self.param_groups:
            first = self.param_groups[0]
            own |= {"step": first["step"], "joined": first["step"], "seed": first["seed"]}
        return {**own, **group}

    def _look_for_the_model(self, added: Sequence[Mapping[str, Any]]) -> None:
        """Of more parameters the owners are others; and the first with curvature wants its forwards
        recorded.
        """
        if self._recorder is not None or self.mode != "replay":
            return
        if self._search is None and not any(map(_has_curvature, added)):
            return
        if self._model is not None:
            check_ownership(self._trained() or self._parameters(), self._model)
            self._take_model(self._model, self._refresher.group)
        elif self._search is not None or not self._is_copy:
            self._begin_search(owners_of(self._parameters()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()`` of Sophia; m and h keep their precision whatever the parameters' is.

        Raises:
            ValueError: it is another optimizer's, or does not fit the parameters. Nothing has changed then.
        """
        loaded: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
            check_origin(state)
            loaded.update(state)

        def after(_: torch.optim.Optimizer) -> None:
            restore_state(self.state, self._parameters(), loaded, self.state_dtype)

        # The last before and the first after: the user's own hooks may rewrite the file, and see it restored.
        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        saved_groups, saved_state = self.param_groups, self.state
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.param_groups, self.state = saved_groups, saved_state
            raise
        finally:
            for handle in handles:
                handle.remove()
        self._warned.clear()
        self._forget()
        self._listen()
        if differing := other_settings(saved_groups, loaded["param_groups"]):
            what = ", ".join(f"{name}={new!r} (not {old!r})" for name, (old, new) in differing.items())
            self._warn_once(
                "loaded",
                f"the loaded state brings its own settings, as torch's do: {what}. To go on with yours, "
                "write them into opt.param_groups after loading",
            )

    def __getstate__(self) -> dict[str, Any]:
        settings = (
            "mode",
            "fraction",
            "batch_dim",
            "state_dtype",
            "stochastic_rounding",
            "likelihood",
            "estimator",
            "logits_fn",
            "mask_fn",
            "copy_inputs",
            "process_group",
            "_ungiven",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in settings}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes through here too: it keeps the model
        names = ("_recorder", "_model", "_search", "_was_found")
        kept = {name: self.__dict__[name] for name in names if name in self.__dict__}
        super().__setstate__(state)
        self.__dict__.setdefault("_ungiven", ())  # pickled by an older Sophia
        if "mode" in state:
            self._is_copy = True
            self._ready()
            self.__dict__.update(kept)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


_log = logging.getLogger("sophia")


@untraced
def _step_outside_of_graphs(work: Work) -> None:
    work.do()


def _has_curvature(group: Mapping[str, Any]) -> bool:
    return RULES[group["rule"]].has_curvature


def _renews(group: Mapping[str, Any]) -> bool:
    """Whether something that trains has curvature."""
    return _has_curvature(group) and any(p.requires_grad for p in group["params"])


def _number(value: float | Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
