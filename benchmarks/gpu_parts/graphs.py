"""The step in a CUDA graph and under ``torch.compile``: is it the eager one, and what does it take?

``capturable=True`` with lr in a tensor, which is changed between two replays. On a CPU the plain step stands
for the replay, and what can be seen there is whether a step reads a tensor as a number: no graph could.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_parts.scene import ABSENT, Scene, say, turn_about, with_gradients
from step_time import spread_curvature
from torch.utils._python_dispatch import TorchDispatchMode

from sophia import Sophia
from sophia.step.dispatch import kernels_of
from sophia.step.hidden_matrices import hidden_matrices

BOUND = 1e-6
REASON = "the same float32 operations on each entry, perhaps fused; over the largest entry of a tensor"
STEPS, ROUNDS, LAYERS = 3, 11, 4


class Reads(TorchDispatchMode):
    """Counts how often a tensor is read as a number."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def twins(scene: Scene, rule: str, **settings: Any) -> tuple[Sophia, Sophia]:
    """Two optimizers of two equal models, with equal h; under the spectral rule of hidden matrices alone."""
    config = scene.model("gpt2-125m")
    config = dataclasses.replace(config, layers=min(LAYERS, config.layers))
    made = []
    for _ in range(2):
        model = with_gradients(config, scene.device)
        group: dict[str, Any] = {"params": list(model.parameters()), "rule": rule}
        if rule == "spectral":
            inside = hidden_matrices(model)
            group |= {"params": [p for p in model.parameters() if id(p) in inside], "scale": 0.2}
        lr = torch.tensor(1e-3, device=scene.device) if settings.get("capturable") else 1e-3
        every = {"update_every": 2**30} if rule == "paper" else {}
        opt = Sophia([group], lr=lr, mode="manual", **every, **settings)
        opt.step()
        torch.manual_seed(2)
        spread_curvature(opt)
        made.append(opt)
    return made[0], made[1]


def difference(own: Sophia, other: Sophia) -> float:
    """The largest one of parameters and state, over the largest entry of the tensor."""
    worst = 0.0
    for p, q in zip(own.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        pairs = [(p.detach(), q.detach()), *((own.state[p][k], other.state[q][k]) for k in other.state[q])]
        for a, b in pairs:
            off = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
            worst = max(worst, off if off < 1e9 else 1e9)  # what is not finite: JSON has no such number
    return worst


def captured(step: Callable[[], object], scene: Scene) -> Callable[[], object]:
    """Take a step to warm up, then what replays one; on a CPU the step itself."""
    if scene.toy:
        step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def times(own: Callable[[], object], eager: Callable[[], object], scene: Scene) -> dict[str, object]:
    """Over the eager step."""
    return turn_about(own, eager, scene=scene, rounds=3 if scene.toy else ROUNDS).to_json()


def in_a_graph(scene: Scene, rule: str, **settings: Any) -> dict[str, Any]:
    """Replays beside eager steps, lr changed on the way."""
    own, other = twins(scene, rule, capturable=True, **settings)
    with Reads() as reads:
        other.step()
    replay = captured(own.step, scene)
    for number in range(STEPS):
        for opt in (own, other):
            opt.param_groups[0]["lr"].fill_(1e-3 * (number + 1))
        replay()
        other.step()
    off = difference(own, other)
    return {
        "difference": off,
        "bound": BOUND,
        "numbers_read": reads.count,
        "kernels": kernels_of(own.param_groups, own.state),
        "capture": ABSENT if scene.toy else "captured",
        "ok": off <= BOUND and reads.count == 0,
        "over_eager": times(replay, other.step, scene),
    }


def compiled(scene: Scene) -> dict[str, Any]:
    """A compiled step beside eager ones."""
    own, other = twins(scene, "paper")
    torch._dynamo.reset()
    # The compiler for a processor takes longer than all else in the dry run.
    step = torch.compile(own.step, backend="eager" if scene.toy else "inductor")
    began = time.monotonic()
    for number in range(STEPS):
        for opt in (own, other):
            opt.param_groups[0]["lr"] = 1e-3 * (number + 1)
        step()
        other.step()
        if number == 0:
            first = time.monotonic() - began
    off = difference(own, other)
    return {
        "difference": off,
        "bound": BOUND,
        "seconds_of_the_first": round(first, 2),
        "ok": off <= BOUND,
        "over_eager": times(step, other.step, scene),
    }


def measure(scene: Scene) -> dict[str, Any]:
    """Each way, on four layers of the 124M model: the compiler's time goes by the number of tensors."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "graph, paper": lambda: in_a_graph(scene, "paper"),
        "graph, paper, one launch": lambda: in_a_graph(scene, "paper", fused=True),
        "graph, spectral": lambda: in_a_graph(scene, "spectral"),
        "compiled, paper": lambda: compiled(scene),
    }
    rows: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        try:
            rows[name] = way()
        except Exception as error:  # a capture that fails says so, and the next way is tried
            rows[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        say(f"{name:26s} {rows[name].get('error') or rows[name]['over_eager']}")
        scene.release()
    wrong = [name for name, row in rows.items() if not row["ok"]]
    return {
        "ok": not wrong,
        "reason": REASON,
        "rows": rows,
        "says": f"wrong: {', '.join(wrong)}" if wrong else "every way is the eager step",
    }
