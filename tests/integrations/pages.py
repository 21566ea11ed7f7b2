"""The examples on the pages of docs/hosts, run as they stand, and what the Sophia inside them did."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sophia import Sophia
from sophia.distributed.shards import local

FOLDER = Path(__file__).parents[2] / "docs" / "hosts"
_EXAMPLE = re.compile(r"^### (.+?)\n[^#]*?^```python\n(.*?)^```", re.M | re.S)


def examples(page: str) -> dict[str, str]:
    """The code under each third-level heading of a page."""
    return dict(_EXAMPLE.findall((FOLDER / page).read_text()))


@dataclass(frozen=True)
class Taken:
    """One step of a Sophia."""

    step: int
    changed: bool
    """Whether any bit of h is another than before the step."""
    counted: float
    """B of the last refresh."""
    lr: float


def refreshed(steps: list[Taken]) -> list[int]:
    """The numbers of the steps on which h changed."""
    return [taken.step for taken in steps if taken.changed]


def run(page: str, title: str, **names: object) -> tuple[dict[str, object], list[Taken]]:
    """Run an example with ``names`` as its reader's own; what it defined, and the steps that were taken."""
    code = compile(examples(page)[title], f"docs/hosts/{page}: {title}", "exec")
    with watching() as steps:
        exec(code, names)
    return names, steps


@contextmanager
def watching() -> Iterator[list[Taken]]:
    """Note every step of every Sophia, and compare h before and after it bit for bit.

    In manual mode h is renewed between two steps: there it is compared with what it was after the last one.
    """
    before: dict[int, tuple[int, torch.Tensor]] = {}
    last: dict[int, tuple[Sophia, torch.Tensor]] = {}  # with its optimizer, so that no other has its id
    steps: list[Taken] = []

    @torch.compiler.disable
    def pre(optimizer, args, kwargs):
        if isinstance(optimizer, Sophia):
            h = _curvature(optimizer)
            known = last.get(id(optimizer))
            if optimizer.mode == "manual":
                h = torch.zeros_like(h) if known is None else known[1]
            elif known is not None and len(known[1]) == len(h):
                assert torch.equal(known[1], h), "h has changed between two steps"
            before[id(optimizer)] = (optimizer.param_groups[0]["step"], h)

    @torch.compiler.disable
    def post(optimizer, args, kwargs):
        if isinstance(optimizer, Sophia):
            (step, old), group = before.pop(id(optimizer)), optimizer.param_groups[0]
            last[id(optimizer)] = (optimizer, _curvature(optimizer))
            changed = not torch.equal(old, last[id(optimizer)][1])
            assert changed == (group["refreshed"] == step), "h and the books of the refreshes differ"
            steps.append(Taken(step, changed, group["counted"], float(group["lr"])))

    handles = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def _curvature(optimizer: Sophia) -> torch.Tensor:
    pieces = [
        local(optimizer.state[p]["hessian"] if optimizer.state.get(p) else torch.zeros_like(p)).detach()
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return torch.cat([piece.flatten().double() for piece in pieces])
