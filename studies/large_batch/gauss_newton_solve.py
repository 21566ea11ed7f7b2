"""The oracle: parameters moved by a solve with their own Gauss-Newton block, by conjugate gradients.

    X = argmin -<u, X> + 1/2 <X, (G + mu) X>,   G = J' H J,   H = (diag p - p p') / N of the logits

u is the look-ahead momentum, J the derivative of the logits in the block (one matrix, all hidden matrices
together, or the whole model), over the last ``parts`` micro-batches of the step. mu is ``damping`` times
<u, G u> / <u, u>. With ``warm`` the solve begins where that of the step before ended, shrunk to its best
length. Nothing of this is cheap: it says how many steps there are to win, before anybody makes it so.
Source: Abreu et al., arXiv 2510.09378 (full and layerwise Gauss-Newton).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rest_of_the_model import hidden_names
from rotated_adam import rest_of
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.lab.optimizers.pair import Pair
from sophia.update_rule import look_ahead, rms

__all__ = ["BlockProducts", "GaussNewton", "WholeModel", "conjugate_gradients"]

Block = Sequence[Tensor]

SOLVE: Mapping[str, Any] = {
    "lr": 0.03,
    "momentum": 0.9,
    "iterations": 30,
    "damping": 0.1,
    "parts": 4,
    "warm": False,
    "length": "rms",
    "weight_decay": 0.0,
}


class GaussNewton(Pair):
    """The oracle for hidden matrices, AdamW or the whitened rule's own step for the rest; a contender."""

    sophia_defaults: Mapping[str, Any] = {
        **SOLVE,
        "block": "matrix",
        "rest_lr": 0.025,
        "rest": "adamw",
        "beta1": 0.9,
        "beta2": 0.95,
    }

    def __init__(self, model: nn.Module, *, lr: float, rest_lr: float, seed: int, **s: Any) -> None:
        of_solve = {name: value for name, value in s.items() if name not in ("rest", "beta1", "beta2")}
        super().__init__(
            Solved(model, sorted(hidden_names(model)), lr=lr, **of_solve), rest_of(model, rest_lr, s)
        )


class Solved(Optimizer):
    """Parameters by name, in one block or each its own."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        lr: float,
        momentum: float,
        iterations: int,
        damping: float,
        parts: int,
        block: str,
        warm: bool,
        length: str,
        weight_decay: float,
    ) -> None:
        if block not in ("matrix", "all") or length not in ("rms", "newton"):
            raise ValueError(f"block {block!r}, length {length!r}: write matrix or all; rms or newton")
        self.model, self.names = model, names
        self.iterations, self.damping, self.block = iterations, damping, block
        self.warm, self.length = warm, length
        self.batches: deque[Tensor] = deque(maxlen=parts)
        model.register_forward_pre_hook(self._keep, with_kwargs=True)
        named = dict(model.named_parameters())
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([named[name] for name in names], defaults)

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self.batches.append(kwargs["input_ids"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step from the gradients that stand and the micro-batches that were seen."""
        (group,) = self.param_groups
        momenta = []
        for w in group["params"]:
            state = self.state[w]
            if not state:
                state["exp_avg"] = torch.zeros_like(w)
            m = state["exp_avg"].lerp_(w.grad, 1 - group["momentum"])
            momenta.append(look_ahead(m, w.grad, beta1=group["momentum"]))
        count = len(momenta)
        for numbers in [[i] for i in range(count)] if self.block == "matrix" else [list(range(count))]:
            u, weights = ([of[i] for i in numbers] for of in (momenta, group["params"]))
            products = BlockProducts(self.model, [self.names[i] for i in numbers], list(self.batches))
            mu = self.damping * float(_inner(u, products(u)) / _inner(u, u).clamp(min=1e-30))
            last = [self.state[w]["solution"] for w in weights if "solution" in self.state[w]]
            x = conjugate_gradients(products, u, mu=mu, iterations=self.iterations, first=last or None)
            for w, d in zip(weights, x, strict=True):
                if self.warm:
                    self.state[w]["solution"] = d
                w.mul_(1 - group["lr"] * group["weight_decay"])
                length = 0.2 / rms(d).clamp(min=1e-30) if self.length == "rms" else 1.0
                w.sub_(group["lr"] * length * d)


class WholeModel(Solved):
    """The oracle for all parameters in one block; a contender."""

    sophia_defaults: Mapping[str, Any] = {**SOLVE, "length": "newton", "lr": 1.0}

    def __init__(self, model: nn.Module, *, lr: float, seed: int, **s: Any) -> None:
        super().__init__(model, [n for n, _ in model.named_parameters()], lr=lr, block="all", **s)


class BlockProducts:
    """``G X`` of the mean loss over some batches, for the Gauss-Newton matrix of some parameters.

    Args:
        model: gives ``.logits`` (sequences, tokens, vocabulary); what the last token predicts is left out.
        names: of the parameters.
        batches: token ids, of equal shapes.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]) -> None:
        named = dict(model.named_parameters())
        self.at = [named[name] for name in names]
        self.passes: list[tuple[Tensor, ...]] = []
        was = model.config._attn_implementation  # type: ignore[union-attr]
        model.set_attn_implementation("eager")  # type: ignore[operator]  # the fused one has one derivative
        with torch.enable_grad():
            for batch in batches:
                logits = model(input_ids=batch).logits[:, :-1]
                # J' w is linear in w, so its derivative in w, applied to x, is J x: two backwards, and the
                # graph is made once.
                w = torch.zeros_like(logits, requires_grad=True)
                transposed = torch.autograd.grad(logits, self.at, w, create_graph=True)
                self.passes.append((logits, logits.detach().softmax(-1), w, *transposed))
        model.set_attn_implementation(was)  # type: ignore[operator]

    def __call__(self, x: Block) -> list[Tensor]:
        """The product with a tensor for each parameter."""
        total = [torch.zeros_like(part) for part in x]
        for logits, p, w, *transposed in self.passes:
            (moved,) = torch.autograd.grad(transposed, w, list(x), retain_graph=True)
            weight = p[..., 0].numel() * len(self.passes)
            back = p * (moved - (p * moved).sum(-1, keepdim=True)) / weight
            for part, value in zip(
                total, torch.autograd.grad(logits, self.at, back, retain_graph=True), strict=True
            ):
                part += value
        return total


def conjugate_gradients(
    products: Callable[[Block], Block],
    u: Block,
    *,
    mu: float,
    iterations: int,
    first: Block | None = None,
) -> list[Tensor]:
    """``(G + mu)^-1 u``, or as near as the iterations come; from 0, or from the best multiple of ``first``.

    >>> import torch
    >>> a = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    >>> conjugate_gradients(lambda x: [a @ x[0]], [torch.tensor([5.0, 5.0])], mu=0.0, iterations=2)
    [tensor([1., 2.])]
    """
    x = [torch.zeros_like(part) for part in u]
    r = [part.clone() for part in u]
    if first is not None:
        moved = [a + mu * b for a, b in zip(products(first), first, strict=True)]
        share = _inner(u, first) / _inner(first, moved).clamp(min=1e-30)
        x = [share * part for part in first]
        r = [a - share * b for a, b in zip(r, moved, strict=True)]
    d, size = [part.clone() for part in r], _inner(r, r)
    for _ in range(iterations):
        if float(size) == 0:
            break
        gd = [a + mu * b for a, b in zip(products(d), d, strict=True)]
        alpha = size / _inner(d, gd)
        x = [a + alpha * b for a, b in zip(x, d, strict=True)]
        r = [a - alpha * b for a, b in zip(r, gd, strict=True)]
        last, size = size, _inner(r, r)
        d = [a + size / last * b for a, b in zip(r, d, strict=True)]
    return x


def _inner(x: Block, y: Block) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(x, y, strict=True)]).sum()
