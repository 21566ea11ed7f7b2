"""The compiled path: threads, what it takes, what the optimizer chooses, and life without it."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from sophia import Sophia
from sophia.step import kernels
from sophia.step.kernels import damped_blocks, foreach, fused_cpu, in_place, single_tensor
from sophia.step.rules import PAPER, RULES, StepSettings

needs_it = pytest.mark.skipif(fused_cpu.unavailable() is not None, reason=str(fused_cpu.unavailable()))
SETTINGS = StepSettings(PAPER, lr=0.01, beta1=0.9, gamma=0.05, eps=1e-12, weight_decay=0.1)


def columns(sizes):
    g = torch.Generator().manual_seed(0)
    rows = [[torch.randn(n, generator=g) for n in sizes] for _ in range(4)]
    return [*rows[:3], [h.abs() for h in rows[3]]]


def stepped(kernel, sizes, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = columns(sizes)
        kernel.step(*made, SETTINGS)
        return [*made[0], *made[2]]
    finally:
        torch.set_num_threads(before)


@needs_it
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_cannot_be_seen(threads):
    """Parts that overlap, or leave a gap between them, at any cut through tensors of any size."""
    sizes = [5, 0, 40_000, 1, 100_003, 17, 65_536, 3]
    one = stepped(fused_cpu, sizes)
    assert all(torch.equal(a, b) for a, b in zip(one, stepped(fused_cpu, sizes, threads), strict=True))


@needs_it
def test_a_fork_can_step(monkeypatch):
    """A pool of threads does not survive a fork; a child that waited for it would hang for ever."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # setting it would wake torch's own threads
    made = columns([200_000])
    fused_cpu.step(*made, SETTINGS)
    child = multiprocessing.get_context("fork").Process(
        target=fused_cpu.step, args=[*made, SETTINGS], daemon=True
    )
    child.start()
    child.join(timeout=30)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()


@needs_it
def test_autograd_learns_of_the_change():
    """A graph that had saved the weight would be differentiated with the stepped one, without an error."""
    weight = nn.Parameter(torch.ones(3))
    opt = Sophia([weight], mode="manual")
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ROW = tuple(torch.zeros(3) for _ in range(4))
LARGE_TURNED = tuple(torch.zeros(1, 2**21 // 8, 8).mT.expand(4, -1, -1))
NONE = {"foreach": None, "fused": None, "differentiable": False, "maximize": False, "rule": "paper"}
CHOICES = [
    # settings, lr, tensors, path with the kernel, path without
    ({}, 0.1, ROW, fused_cpu, foreach),
    ({"rule": "damped"}, 0.1, ROW, fused_cpu, damped_blocks),
    ({"rule": "damped", "fused": False}, 0.1, ROW, damped_blocks, damped_blocks),
    ({"rule": "damped", "foreach": False}, 0.1, ROW, single_tensor, single_tensor),
    ({"rule": "damped", "maximize": True}, 0.1, ROW, fused_cpu, single_tensor),
    ({"rule": "damped", "differentiable": True}, 0.1, ROW, single_tensor, single_tensor),
    ({"rule": "damped"}, torch.tensor(0.1), ROW, single_tensor, single_tensor),
    (
        {"rule": "damped"},
        0.1,
        tuple(t.expand(2**21) for t in torch.zeros(4, 1)),
        single_tensor,
        single_tensor,
    ),
    ({"rule": "damped"}, 0.1, LARGE_TURNED, fused_cpu, damped_blocks),
    ({"rule": "spectral"}, 0.1, ROW, in_place, in_place),
    ({"rule": "spectral", "foreach": False}, 0.1, ROW, single_tensor, single_tensor),
    ({"rule": "whitened"}, 0.1, (*ROW[:2], ROW[2].bfloat16(), {}), single_tensor, single_tensor),
    ({"fused": True}, 0.1, ROW, fused_cpu, foreach),
    ({"fused": False}, 0.1, ROW, foreach, foreach),
    ({"foreach": True}, 0.1, ROW, foreach, foreach),
    ({"foreach": False}, 0.1, ROW, single_tensor, single_tensor),
    ({"foreach": False, "fused": False}, 0.1, ROW, single_tensor, single_tensor),
    ({"differentiable": True}, 0.1, ROW, single_tensor, single_tensor),
    ({}, torch.tensor(0.1), ROW, foreach, foreach),
    ({}, 0.1, tuple(t.double() for t in ROW), fused_cpu, foreach),
    ({}, 0.1, (*ROW[:2], ROW[2].double(), ROW[3].double()), foreach, foreach),
    ({}, 0.1, (ROW[0].half(), ROW[1].half(), *ROW[2:]), fused_cpu, foreach),
    ({}, 0.1, tuple(t.bfloat16() for t in ROW), fused_cpu, foreach),
    ({"fused": True}, 0.1, (ROW[0].half(), ROW[1].half(), *ROW[2:]), fused_cpu, foreach),
    ({"fused": True}, 0.1, (ROW[0].half(), *ROW[1:]), single_tensor, single_tensor),
    ({}, 0.1, (torch.zeros(6)[::2], *ROW[1:]), single_tensor, single_tensor),
]


@pytest.mark.parametrize(("changed", "lr", "row", "path", "without"), CHOICES)
def test_choice_of_the_path(monkeypatch, changed, lr, row, path, without):
    """An explicit True or False that is ignored, or a path given tensors it would walk through wrongly."""
    group = {**NONE, **changed}
    rule = RULES[group["rule"]].moving(row[0])
    if fused_cpu.unavailable() is None:
        assert kernels.choose(rule, group, lr, row) is path
    monkeypatch.setattr(fused_cpu, "unavailable", lambda: "not here")
    assert kernels.choose(rule, group, lr, row) is without


def test_without_the_kernel_fused_true_says_why(monkeypatch):
    """A user who asked for it must not get a slower path in silence; one who did not ask must not see an
    error.
    """
    monkeypatch.setattr(fused_cpu, "unavailable", lambda: "the compiled kernel is not there")
    Sophia([nn.Parameter(torch.zeros(1))], mode="manual")
    with pytest.raises(
        RuntimeError, match=r"fused=True: the compiled kernel is not there\. Leave fused=None"
    ):
        Sophia([nn.Parameter(torch.zeros(1))], mode="manual", fused=True)


def test_why_it_is_unavailable(monkeypatch, tmp_path):
    """The reason is what a user needs: not built, built for another machine, or of another version,
    whose call would read arguments from the wrong places.
    """
    fused_cpu._library.cache_clear()
    monkeypatch.setattr(fused_cpu, "__file__", str(tmp_path / "fused_cpu.py"))
    assert "no C compiler was found" in fused_cpu.unavailable()
    fused_cpu._library.cache_clear()
    (tmp_path / "_fused_cpu.so").write_bytes(os.urandom(100))
    assert "cannot be loaded" in fused_cpu.unavailable()
    fused_cpu._library.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(fused_cpu, "_VERSION", -1)
    if Path(fused_cpu.__file__).with_name("_fused_cpu.so").exists():
        assert "belongs to another version of the package" in fused_cpu.unavailable()
    fused_cpu._library.cache_clear()
