"""Orthogonalised momentum, whitened by statistics to choose from: the study's candidates, and their controls.

    D = L^-p polar(L^-p u R^-p) R^-p,   W <- W (1 - lr wd) - 0.2 lr D / rms(D)

u is the look-ahead momentum of a hidden matrix W (a, b). L (a, a) and R (b, b) are second moments of rows and
of columns, relative to their mean eigenvalue, plus a damping. ``statistics`` says of what:

    none             L = R = 1: Muon, with the size of its step exact
    momentum         diagonals of u u' and u' u, of this step alone; no state
    gradients        mean of g g' and g' g over steps: Shampoo's factors; no hooks, no labels
    training-labels  the layer's inputs and the gradients of its outputs under the labels of the text
    sampled-labels   the same under labels drawn from the model: the Kronecker factors of Gauss-Newton (K-FAC)

With ``outputs`` each output's part of D is divided by its root mean square over steps (NorMuon, arXiv
2510.05491). "sampled-labels" is curvature, "training-labels" its control: the same pass and cost but for the
draw. Embeddings, head and vectors are trained by AdamW with a rate of their own, as beside Muon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from passes import Passes
from rotated_adam import rest_of
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.lab.optimizers.contender import matrices_decayed
from sophia.lab.optimizers.pair import Pair
from sophia.step.hidden_matrices import hidden_matrices
from sophia.step.polar import polar_of
from sophia.update_rule import along, eigenbasis, inverse_power, look_ahead, rms

__all__ = ["STATISTICS", "HiddenMatrices", "WhitenedPolar"]

SIDES = ("both", "short", "mixed")
STATISTICS = ("none", "momentum", "gradients", "training-labels", "sampled-labels")


class WhitenedPolar(Pair):
    """Both parts as the lab takes them: the model, and settings by name."""

    sophia_defaults: Mapping[str, Any] = {
        "lr": 0.03,
        "rest_lr": 0.025,
        "statistics": "gradients",
        "momentum": 0.9,
        "inside": 0.25,
        "outside": 0.25,
        "damping": 1e-4,
        "average": 0.9,
        "every": 5,
        "sides": "both",
        "polar": True,
        "outputs": 0.0,
        "rest": "adamw",
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.0,
    }

    def __init__(self, model: nn.Module, *, lr: float, rest_lr: float, seed: int, **s: Any) -> None:
        of_rest = {name: s.pop(name) for name in ("beta1", "beta2", "rest")}
        super().__init__(
            HiddenMatrices(model, lr=lr, seed=seed, **s), rest_of(model, rest_lr, {**s, **of_rest})
        )


class HiddenMatrices(Optimizer):
    """The formula above, for the hidden matrices of a model.

    Args:
        model: whose hidden matrices are trained.
        lr: five times the root mean square of a step.
        seed: of the labels, where they are drawn.
        statistics: one of `STATISTICS`.
        momentum: decay of the momentum, a step.
        inside: p within the polar factor.
        outside: p around it.
        damping: added to the eigenvalues, in units of their mean.
        average: decay of L and R, a step.
        every: steps between two decompositions of L and R.
        sides: "both"; "short": only the shorter side of the matrix; or "mixed": beside it
            the diagonal of u' u, of this step, for the longer one.
        polar: False leaves the polar factor out: Shampoo's step.
        outputs: decay of the mean squares of outputs, a step; 0 for none.
        weight_decay: decoupled, times lr.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        seed: int,
        statistics: str,
        momentum: float,
        inside: float,
        outside: float,
        damping: float,
        average: float,
        every: int,
        sides: str,
        polar: bool,
        outputs: float,
        weight_decay: float,
    ) -> None:
        if statistics not in STATISTICS or sides not in SIDES:
            raise ValueError(
                f"statistics {statistics!r} and sides {sides!r}: one of {STATISTICS}; of {SIDES}"
            )
        hidden = hidden_matrices(model)
        named = dict(model.named_parameters())
        matrices = [p for p in named.values() if id(p) in hidden]
        self.passes = Passes(model, matrices, seed, drawn=statistics == "sampled-labels")
        self.by_passes = statistics.endswith("labels")
        if self.by_passes:
            self.passes.watch()
        defaults = dict(
            lr=lr,
            momentum=momentum,
            inside=inside,
            outside=outside,
            damping=damping,
            average=average,
            every=every,
        )
        super().__init__(
            matrices_decayed(
                model, {"weight_decay": weight_decay}, only=lambda name: id(named[name]) in hidden
            ),
            {**defaults, "statistics": statistics, "sides": sides, "polar": polar, "outputs": outputs},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step from the gradients that stand."""
        for group in self.param_groups:
            seen = self.passes.moments(self._steps(group)) if self.by_passes else {}
            for w in group["params"]:
                if w.grad is not None:
                    self._move(w, w.grad, group, seen.get(id(w)))

    def _steps(self, group: Mapping[str, Any]) -> int:
        return max((int(self.state[p].get("step", 0)) for p in group["params"]), default=0)

    def _move(
        self, w: Tensor, g: Tensor, group: Mapping[str, Any], seen: tuple[Tensor, Tensor] | None
    ) -> None:
        state = self.state[w]
        if not state:
            state["step"], state["exp_avg"] = 0, torch.zeros_like(w)
        state["step"] += 1
        m = state["exp_avg"].lerp_(g, 1 - group["momentum"])
        u = look_ahead(m, g, beta1=group["momentum"])
        left, right = self._whitening(u, g, state, group, seen)
        d = right(left(u, group["inside"]), group["inside"])
        d = polar_of(d) if group["polar"] else d
        d = right(left(d, group["outside"]), group["outside"]) if group["polar"] else d
        if group["outputs"]:
            mean = d.square().mean(self.passes.inputs_along(w), keepdim=True)
            square = state.setdefault("outputs", torch.zeros_like(mean)).lerp_(mean, 1 - group["outputs"])
            d = d / (square / (1 - group["outputs"] ** state["step"])).sqrt().clamp(min=1e-30)
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.sub_(d / rms(d).clamp(min=1e-30), alpha=0.2 * group["lr"])

    def _whitening(
        self,
        u: Tensor,
        g: Tensor,
        state: dict[str, Any],
        group: Mapping[str, Any],
        seen: tuple[Tensor, Tensor] | None,
    ) -> tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]:
        """What whitens from the left, and from the right: (matrix, power) -> matrix."""
        kind = group["statistics"]
        left, right = (group["sides"] == "both" or _is_short(u, side) for side in (0, 1))
        if kind == "none":
            return _nothing, _nothing
        rows, columns = (_scaling(u.square().mean(d, keepdim=True), group["damping"]) for d in (1, 0))
        if kind == "momentum":
            return rows if left else _nothing, columns if right else _nothing
        new = {"left": seen[0], "right": seen[1]} if seen is not None else {}
        if kind == "gradients":
            new = {"left": g @ g.T, "right": g.T @ g}
        for side, wanted in (("left", left), ("right", right)):
            if wanted and side in new:
                kept = state.setdefault(side, torch.zeros_like(new[side]))
                kept.lerp_(new[side], 1 - group["average"])
        renewed = (state["step"] - 1) % group["every"] == 0
        if group["sides"] != "mixed":
            rows = columns = _nothing
        return (
            self._rotated(state, group, "left", renewed) if left else rows,
            self._rotated(state, group, "right", renewed) if right else columns,
        )

    def _rotated(
        self, state: dict[str, Any], group: Mapping[str, Any], side: str, renewed: bool
    ) -> Callable[[Tensor, float], Tensor]:
        for power in {group["inside"], group["outside"]}:
            name = f"{side} to {power}"
            if renewed or name not in state:
                state[name] = _inverse_power(state[side], power, group["damping"])
        if side == "left":
            return lambda x, power: state[f"left to {power}"] @ x
        return lambda x, power: x @ state[f"right to {power}"]


def _inverse_power(moment: Tensor, power: float, damping: float) -> Tensor:
    exact = moment.double()
    basis = eigenbasis(exact)
    return inverse_power(along(exact, basis), basis, power=power, damping=damping).to(moment.dtype)


def _is_short(x: Tensor, side: int) -> bool:
    """Whether this side of a matrix is the shorter one; of a square one the rows."""
    return x.size(side) < x.size(1 - side) or (side == 0 and x.size(0) == x.size(1))


def _nothing(x: Tensor, power: float) -> Tensor:
    return x


def _scaling(mean: Tensor, damping: float) -> Callable[[Tensor, float], Tensor]:
    relative = mean / mean.mean().clamp(min=1e-30) + max(damping, 1e-12)
    return lambda x, power: x * relative.pow(-power)
