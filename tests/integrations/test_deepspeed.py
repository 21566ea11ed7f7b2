"""docs/hosts/deepspeed.md: the engine without ZeRO; ZeRO refused before anything has moved."""

import importlib.util
import os
import sys

import pytest
import teams
import torch
import torch.distributed as dist
from pages import refreshed, run
from tiny_hosts import pairs

from sophia import Sophia
from tiny import GPT, T, data

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed (extra [hosts]) and a C++ compiler",
)


@pytest.fixture(scope="module")
def team():
    """Two ranks of their own: DeepSpeed keeps its process groups for as long as a process lives."""
    team = teams.Team(2)
    yield team
    team.close()


def answers(team, function, **arguments):
    # The very first start builds an extension, which takes minutes on a busy machine.
    found = team.answers(function, within=900, port=29431, **arguments)
    assert [kind for kind, _ in found] == ["ok"] * team.size, found
    return [value for _, value in found]


def start(port):
    """DeepSpeed on the process group that the team already has."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Where the environment's own programs are: the build looks for ninja.
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return deepspeed


def page(port):
    start(port)
    _, steps = run("deepspeed.md", "The engine, stage 0", model=GPT(), batches=pairs(96, batch_size=4))
    return steps


def test_page(team):
    """The engine calls step() for the whole accumulation, and its own zero_grad."""
    for steps in answers(team, page):
        assert [taken.step for taken in steps] == list(range(12))
        assert refreshed(steps) == [0, 10]
        assert {taken.counted for taken in steps} == {2 * 4 * T}  # one of two micro-batches on each rank


def first_step_under_zero(port, stage):
    model = GPT(layers=1)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = start(port).initialize(model=model, optimizer=Sophia(model), config=settings)
    engine.backward(engine(*data(4))[1])
    before = [p.detach().clone() for p in model.parameters()]
    try:
        engine.step()
    except RuntimeError as error:
        same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        return str(error), same
    return "no error", False


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_is_refused(team, stage):
    """Pieces of flat copies would be stepped by sign momentum, with a curvature that never comes."""
    for said, unmoved in answers(team, first_step_under_zero, stage=stage):
        assert "no longer, parameters of GPT; a wrapper (DeepSpeed ZeRO" in said
        assert unmoved
