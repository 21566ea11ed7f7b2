"""Adam in the eigenbasis of a matrix's gradients: SOAP, its one-sided form, and SOAP in the polar factor.

    M <- beta1 M + (1 - beta1) G                  W: (a, b), as G and M
    L <- average L + (1 - average) G G',   R likewise of G' G,   Q_L and Q_R their eigenvectors, every k steps
    V <- beta2 V + (1 - beta2) (Q_L' G Q_R)^2
    D = Q_L [ (Q_L' M Q_R) / (sqrt(V) + eps) ] Q_R'

M and V are corrected for their start at zero. With one side the other rotation is left out, which is what a
token table can pay for: its short side is the width. ``factored`` keeps of V its row and column means
alone, V_ij = rows_i columns_j / mean: a + b numbers in place of a b (Shazeer and Stern, arXiv 1804.04235).
Source of the rotation: Vyas et al., SOAP, arXiv 2409.11321, Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from rest_of_the_model import by_adamw, hidden_names
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.lab.optimizers.contender import matrices_decayed
from sophia.lab.optimizers.pair import Pair
from sophia.step.polar import polar_of
from sophia.update_rule import rms

__all__ = ["RotatedAdam", "Soap", "rest_of"]


class RotatedAdam(Optimizer):
    """The formula above for matrices, Adam for what has another number of dimensions.

    Args:
        params: parameters, or groups.
        lr: as Adam's; with ``polar`` five times the root mean square of a step.
        betas: decays of M and V.
        average: decay of L and R.
        every: steps between two decompositions.
        sides: "both", or "short": the side that is not the longer one.
        factored: keep row and column means of V alone.
        polar: take the polar factor of D, of rms 0.2.
        eps: Adam's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        average: float,
        every: int,
        sides: str,
        factored: bool = False,
        polar: bool = False,
        eps: float = 1e-8,
    ) -> None:
        if sides not in ("both", "short"):
            raise ValueError(f"sides is {sides!r}: write both or short")
        settings = dict(lr=lr, betas=betas, average=average, every=every, sides=sides, polar=polar, eps=eps)
        super().__init__(params, {**settings, "factored": factored, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step from the gradients that stand."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    d = self._direction(w, w.grad, group)
                    if group["polar"]:
                        d = polar_of(d)
                        d = 0.2 * d / rms(d).clamp(min=1e-30)
                    w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(d, alpha=group["lr"])

    def _direction(self, w: Tensor, g: Tensor, group: Mapping[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[w], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(w)}
        state["step"] += 1
        left, right = self._bases(g, state, group) if w.ndim == 2 else (None, None)
        m = state["exp_avg"].lerp_(g, 1 - beta1)
        turned = _turned(g, left, right)
        v = self._second_moment(turned.square(), state, group["factored"] and w.ndim == 2, 1 - beta2)
        size = (v / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        d = _turned(m / (1 - beta1 ** state["step"]), left, right) / size
        return _turned(d, None if left is None else left.T, None if right is None else right.T)

    @staticmethod
    def _second_moment(square: Tensor, state: dict[str, Any], factored: bool, part: float) -> Tensor:
        if not factored:
            return state.setdefault("exp_avg_sq", torch.zeros_like(square)).lerp_(square, part)
        rows, columns = (
            state.setdefault(name, torch.zeros_like(mean)).lerp_(mean, part)
            for name, mean in (
                ("rows", square.mean(1, keepdim=True)),
                ("columns", square.mean(0, keepdim=True)),
            )
        )
        return rows * columns / rows.mean().clamp(min=1e-30)

    def _bases(
        self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        found: list[Tensor | None] = []
        for side, x in (("left", g), ("right", g.T)):
            if group["sides"] == "short" and x.size(0) > x.size(1):
                found.append(None)
                continue
            moment = x @ x.T
            kept = state.setdefault(side, torch.zeros_like(moment)).lerp_(moment, 1 - group["average"])
            if (state["step"] - 1) % group["every"] == 0:
                state[f"{side} basis"] = torch.linalg.eigh(kept)[1]
            found.append(state[f"{side} basis"])
        return found[0], found[1]


class Soap(Pair):
    """SOAP for hidden matrices, AdamW for embeddings, head and vectors; the lab's contender."""

    sophia_defaults: Mapping[str, Any] = {
        "lr": 0.003,
        "rest_lr": 0.025,
        "polar": False,
        "momentum": 0.9,
        "second": 0.95,
        "average": 0.95,
        "every": 5,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.0,
    }

    def __init__(self, model: nn.Module, *, lr: float, rest_lr: float, seed: int, **s: Any) -> None:
        hidden = hidden_names(model)
        super().__init__(
            RotatedAdam(
                matrices_decayed(model, s, only=lambda name: name in hidden),
                lr=lr,
                betas=(s["momentum"], s["second"]),
                average=s["average"],
                every=s["every"],
                sides="both",
                polar=s["polar"],
            ),
            by_adamw(model, rest_lr, s),
        )


def _turned(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left' x right``; what is None is the identity."""
    x = x if left is None else left.T @ x
    return x if right is None else x @ right


def rest_of(model: nn.Module, lr: float, s: Mapping[str, Any]) -> Optimizer:
    """What trains all but the hidden matrices: adamw, or one of those here, rotated or factored."""
    if s["rest"] == "adamw":
        return by_adamw(model, lr, s)
    if s["rest"] not in ("rotated", "factored"):
        raise ValueError(f"rest is {s['rest']!r}: write adamw, rotated or factored")
    hidden = hidden_names(model)
    return RotatedAdam(
        matrices_decayed(model, s, only=lambda name: name not in hidden),
        lr=lr,
        betas=(s["beta1"], s["beta2"]),
        average=s.get("average", 0.9),
        every=s.get("every", 5),
        sides="short",
        factored=s["rest"] == "factored",
    )
