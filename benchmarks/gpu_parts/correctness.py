"""Every path of the step on the device against the plain rule in float64 on the CPU, on awkward shapes.

Each step begins from the device's own numbers, which float64 holds exactly, so that nothing adds up and a
bound is that of one step. Compared are the parameters and all state that the step has written.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_parts.scene import Scene, say
from torch import Tensor, nn

from sophia import Sophia
from sophia.step.dispatch import kernels_of
from sophia.step.kernels import fused_cuda
from sophia.step.polar import multiplies_bfloat16
from sophia.step.rules import RULES

STEPS = 6  # one more than the steps between two decompositions
LR = 0.1
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """A rule on a path, in a dtype."""

    rule: str
    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    bound: float = 8 * EPS
    """Of the difference over the largest entry of a tensor, before what is stored is rounded."""
    reason: str = "a few float32 operations on each entry"


PATHS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "one launch": {"fused": True},
    "foreach": {"foreach": True},
    "tensor by tensor": {"foreach": False},
}
HALVES = (torch.bfloat16, torch.float16)
SUMS = (1e-4, "float32 sums over whole matrices in another order, and roots of them; 6e-7 on a CPU")
POLAR = (0.006, "of polar factors in bfloat16, off by up to 0.05 of their norm, times lr; 0.0016 on a CPU")
ROUNDED = "; then one rounding of what is stored, below a unit in its last place"


def cases(device: str) -> list[Case]:
    """All of them. The rules for matrices have two paths, and no kernel of their own on a GPU."""
    polar = POLAR if multiplies_bfloat16(torch.device(device)) else SUMS
    bounds = {"spectral": polar, "whitened": polar, "factored": SUMS}
    found = []
    for rule in RULES:
        own = dict(zip(("bound", "reason"), bounds[rule], strict=True)) if rule in bounds else {}
        for path, settings in PATHS.items():
            if rule == "paper" or path in ("default", "tensor by tensor"):
                found.append(Case(rule, path, settings, **own))
        found += [Case(rule, "default", {}, dtype, **own) for dtype in HALVES]
    found += [Case("paper", "one launch", PATHS["one launch"], dtype) for dtype in HALVES]
    by_chance = {"state_dtype": torch.bfloat16, "stochastic_rounding": True}
    return [*found, Case("paper", "default, rounded by chance", by_chance, torch.bfloat16)]


def tensors() -> dict[str, Tensor]:
    """Awkward shapes, float32 on the CPU."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    return {
        "1 x 1": normal(1, 1),
        "number": normal(),
        "bias": normal(7),
        "empty": normal(0),
        "empty matrix": normal(0, 3),
        "matrix": normal(48, 200),
        "column": normal(70, 1),
        "transposed": normal(40, 150).t(),
        "every other row": normal(60, 90)[::2],
        "inside a buffer": normal(4000)[13:3013].view(30, 100),
        "one more than two blocks": normal(2049),
        "channels last": normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


def placed(tensor: Tensor, device: str, dtype: torch.dtype) -> nn.Parameter:
    """On the device, with the same gaps between its elements."""
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    memory = torch.zeros(span if tensor.numel() else 0, device=device, dtype=dtype)
    return nn.Parameter(memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor))


def optimizer(params: list[nn.Parameter], rule: str, hessians: list[Tensor], **settings: Any) -> Sophia:
    """The step alone, h set by hand, all kinds of tensors moved alike."""
    group: dict[str, Any] = {"params": params, "rule": rule}
    if RULES[rule].needs_model:
        group["scale"] = 0.5
    every = {"update_every": 2**30} if RULES[rule].has_curvature else {}
    opt = Sophia([group], lr=LR, mode="manual", **every, **settings)
    for p, h in zip(params, hessians, strict=True):
        if RULES[rule].has_curvature:
            kept = p.dtype if p.dtype == torch.float64 else settings.get("state_dtype", torch.float32)
            state = opt.state[p]
            state["exp_avg"] = torch.zeros_like(p, dtype=kept, requires_grad=False)
            state["hessian"] = torch.empty_like(p, dtype=kept, requires_grad=False).copy_(h)
    return opt


def difference(own: Tensor, truth: Tensor) -> float:
    """The largest difference over the largest entry; 1e9, which JSON has, where one is not finite."""
    off = float((own.double().cpu() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))
    return off if off < 1e9 else 1e9


def compare(case: Case, device: str) -> dict[str, Any]:
    """Take the steps; the worst tensor, and the paths that were really taken."""
    shapes = tensors()
    made = torch.Generator().manual_seed(1)
    hs = [
        torch.randn(t.shape, generator=made).mul(3).exp() * (torch.rand(t.shape, generator=made) > 0.1)
        for t in shapes.values()
    ]
    params = [placed(t, device, case.dtype) for t in shapes.values()]
    truths = [nn.Parameter(p.detach().double().cpu().contiguous()) for p in params]
    opt = optimizer(params, case.rule, hs, **case.settings)
    plain = optimizer(truths, case.rule, hs, foreach=False, fused=False)
    # Signs of their own that stay: an m that cancels to nothing has a sign that is anybody's.
    signs = [torch.randn(t.shape, generator=made).sign() for t in shapes.values()]
    worst, row = 0.0, {}
    for _ in range(STEPS):
        for p, q, sign in zip(params, truths, signs, strict=True):
            g = (sign * (0.5 + torch.rand(sign.shape, generator=made))).to(case.dtype)
            p.grad = torch.empty_like(p).copy_(g)
            q.grad = g.double()
            with torch.no_grad():
                q.copy_(p)
            for name, value in opt.state[p].items():
                plain.state[q][name] = value.to("cpu", torch.float64, copy=True)
        opt.step()
        plain.step()
        for name, p, q in zip(shapes, params, truths, strict=True):
            if not p.numel():
                continue  # what is kept of nothing is a mean of nothing
            kept = {key: (opt.state[p][key], plain.state[q][key]) for key in opt.state[p] if key in WRITTEN}
            for what, (own, truth) in {"theta": (p.detach(), q.detach()), **kept}.items():
                found, bound = difference(own, truth), case.bound + torch.finfo(own.dtype).eps
                if found / bound >= worst:
                    worst = found / bound
                    row = {"difference": found, "bound": bound, "worst": f"{what} of {name}"}
    kernels = kernels_of(opt.param_groups, opt.state)
    taken = device == "cpu" or case.path != "one launch" or "fused_cuda" in kernels
    return {
        "rule": case.rule,
        "path": case.path,
        "dtype": str(case.dtype).removeprefix("torch."),
        "kernels": kernels,
        **row,
        "reason": case.reason + ROUNDED,
        "ok": worst <= 1 and taken,
    }


WRITTEN = ("exp_avg", "momentum_rms", "second_moment", "basis_squares", "mean_squares", "exp_avg_sq")
"""State that has one right value: not the basis, whose columns may turn their signs."""


def measure(scene: Scene) -> dict[str, Any]:
    """All cases, and whether the one launch of the GPU is used there at all."""
    rows: list[dict[str, Any]] = []
    triton = "the processor's compiled loop stands for it" if scene.toy else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not scene.toy:
            triton = fused_cuda.unavailable(torch.device(scene.device, torch.cuda.current_device()))
        for case in cases(scene.device):
            try:
                rows.append(compare(case, scene.device))
            except Exception as error:  # the other paths are compared all the same
                said = f"{type(error).__name__}: {error}"[:300]
                rows.append({"rule": case.rule, "path": case.path, "ok": False, "error": said})
            if not rows[-1]["ok"]:
                say(f"WRONG: {rows[-1]}")
    right = sum(row["ok"] for row in rows)
    launched = scene.toy or triton is None
    return {
        "ok": right == len(rows) and launched,
        "triton": triton or "used",
        "rows": rows,
        "says": f"{right} of {len(rows)} paths are the rule" + ("" if launched else f"; no Triton: {triton}"),
    }
