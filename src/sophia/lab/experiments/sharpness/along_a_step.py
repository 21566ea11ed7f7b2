"""What a step d = theta_after - theta_before does to a held-out loss, to second order.

    L(theta + d) - L(theta) = g'd + d'Hd / 2 + O(|d|^3)

The second term is ``|d|^2 / 2`` times the directional sharpness ``d'Hd / |d|^2``, which does not depend on
how long the step is. H is the whole Hessian, by differentiating the gradient's product with d once more. G,
its Gauss-Newton part, is ``J'(diag p - pp')J``, averaged over predictions with p their probabilities; it
takes Jd alone, a derivative in forward mode, and is never negative. No sampling in either. (Wang et al.,
"Why Muon Outperforms Adam", arXiv 2606.04662, take the steps of optimizers apart in this way.)

With the parameters in parts, ``d'Hd`` is a sum over parts l of ``d_l'H_ll d_l`` and what lies between them.

Sharpness depends on the size of the weights too: where a layer norm follows, weights twice as large have a
quarter of the curvature. So the squared lengths of weights and step are kept for each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.step.groups import is_vector

__all__ = ["KINDS", "Expansion", "expand", "gauss_newton", "hessian", "kind", "parts"]

KINDS = ("table", "hidden", "vectors")


@dataclass(frozen=True)
class Expansion:
    """A step, seen from a held-out loss. What is said of parts is in their order."""

    loss: float
    """Before the step."""
    change: float
    """The loss after it minus that before."""
    gain: float
    """-g'd: what the step would gain if the loss were straight."""
    hessian: float
    """d'Hd."""
    gauss_newton: float
    """d'Gd."""
    within: list[float]
    """d_l'H_ll d_l."""
    kinds: list[float]
    """The same of all parts of a kind together, in the order of ``KINDS``."""
    squared: list[float]
    """|d_l|^2."""
    weights: list[float]
    """|theta_l|^2."""


def kind(part: str) -> str:
    """The kind of a part by its name: "table", "hidden" or "vectors".

    >>> kind("transformer.wte.weight"), kind("transformer.h.0.mlp.c_fc.weight"), kind("vectors")
    ('table', 'hidden', 'vectors')
    """
    return "vectors" if part == "vectors" else "hidden" if ".h." in part else "table"


def parts(model: nn.Module) -> dict[str, list[int]]:
    """Which of the model's parameters make a part: each matrix is one, all vectors together are one."""
    found: dict[str, list[int]] = {}
    for place, (name, parameter) in enumerate(model.named_parameters()):
        found.setdefault("vectors" if is_vector(name, parameter.shape) else name, []).append(place)
    return found


def expand(
    model: nn.Module,
    ids: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    of: Mapping[str, Sequence[int]],
) -> Expansion:
    """The expansion at ``before`` along the step to ``after``, of the loss on ``ids`` (sequences, context).

    The model's weights are overwritten.
    """
    d = [b - a for a, b in zip(before, after, strict=True)]
    after_it = _loss(model, ids, after)
    loss = _loss(model, ids, before)
    together = [[i for part, some in of.items() if kind(part) == k for i in some] for k in KINDS]
    gain, (whole, *forms) = hessian(model, ids, d, [range(len(d)), *of.values(), *together])

    def squares(tensors: Sequence[Tensor]) -> list[float]:
        return [sum(float(tensors[i].double().square().sum()) for i in places) for places in of.values()]

    return Expansion(
        loss=loss,
        change=after_it - loss,
        gain=gain,
        hessian=whole,
        gauss_newton=gauss_newton(model, ids, d),
        within=forms[: len(of)],
        kinds=forms[len(of) :],
        squared=squares(d),
        weights=squares(before),
    )


def hessian(
    model: nn.Module, ids: Tensor, d: Sequence[Tensor], of: Sequence[Sequence[int]]
) -> tuple[float, list[float]]:
    """-g'd, and d_l'H_ll d_l of each set of parameters, at the model's weights."""
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = model(input_ids=ids, labels=ids).loss
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)

    def form(places: Sequence[int]) -> float:
        if not places:
            return 0.0
        along = torch.stack([(gradient[i] * d[i]).sum() for i in places]).sum()
        again = torch.autograd.grad(
            along, [parameters[i] for i in places], retain_graph=True, materialize_grads=True
        )
        return _dot(again, [d[i] for i in places])

    gain = -_dot([g.detach() for g in gradient], d)
    return gain, [form(places) for places in of]


def gauss_newton(model: nn.Module, ids: Tensor, d: Sequence[Tensor]) -> float:
    """Return d'Gd at the model's weights: the mean over predictions of the variance of Jd under p."""

    def logits(weights: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(model, weights, (), {"input_ids": ids}).logits
        return output[:, :-1]

    weights = {name: p.detach() for name, p in model.named_parameters()}
    tangents = dict(zip(weights, d, strict=True))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        value, moved = torch.func.jvp(logits, (weights,), (tangents,))[:2]
        p, moved = value.double().softmax(-1), moved.double()
        mean = (p * moved).sum(-1, keepdim=True)
        return float((p * (moved - mean).square()).sum(-1).mean())


def _loss(model: nn.Module, ids: Tensor, weights: Sequence[Tensor]) -> float:
    """The loss with these weights, which the model keeps; added up in float64."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
        logits = model(input_ids=ids).logits[:, :-1].double()
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
