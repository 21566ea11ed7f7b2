"""docs/hosts/accelerate.md: accumulation and bf16 in one process, FSDP2 in two."""

import pytest
import teams
import torch
import torch.distributed as dist
from pages import refreshed, run

accelerate = pytest.importorskip("accelerate", reason="needs accelerate (extra [dev])")
pytest.importorskip("transformers", reason="needs the extra [lab]")

from tiny_hosts import COUNTED, gpt2, loader  # noqa: E402


@pytest.fixture
def _afresh():
    """Accelerate keeps one state a process, the first one's settings."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_afresh")
def test_page():
    """Accelerate calls step() on every micro-batch and drops most of the calls itself."""
    names, steps = run(
        "accelerate.md", "Accumulation, bf16, clipping", model=gpt2(), loader=loader(96, batch_size=4)
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * COUNTED}
    assert steps[0].lr < steps[-1].lr == 6e-4
    assert names["opt"].optimizer.stats()["age"] == 2


def sharded_page(port):
    """Run the example on this rank, and say what it was run on."""
    import os

    where = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    where = {**where, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in where.items()})
    try:
        # accelerate offers FSDP on accelerators alone; its code runs on a CPU that is called another kind.
        accelerate.PartialState(cpu=True)
        accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_GPU
        names, steps = run("accelerate.md", "FSDP2", model=gpt2(), loader=loader(96, batch_size=2))
        state = names["opt"].optimizer.state
        kinds = {type(t).__name__ for p in names["model"].parameters() for t in (p, *state[p].values())}
        whole = torch.cat([state[p]["hessian"].full_tensor().flatten() for p in names["model"].parameters()])
        return kinds, steps, whole
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
        for name in (*where, "ACCELERATE_USE_FSDP"):
            os.environ.pop(name, None)


def test_page_on_two_ranks():
    """The parameters are exchanged under the optimizer. Sophia must follow: sharded state and one B."""
    answers = teams.run(2, sharded_page, within=300, port=29400)  # the ranks import their frameworks first
    for kinds, steps, whole in answers:
        assert kinds == {"DTensor"}
        assert [taken.step for taken in steps] == list(range(12))
        assert refreshed(steps) == [0, 10]
        assert {taken.counted for taken in steps} == {
            2 * 2 * COUNTED
        }  # one of two micro-batches, on each rank
        assert torch.equal(whole, answers[0][2])
