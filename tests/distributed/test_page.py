"""docs/distributed.md: what it shows runs as it stands."""

import re
from pathlib import Path

import teams
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from tiny import GPT, data

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
NAMES = (
    DistributedDataParallel,
    Sophia,
    fully_shard,
    get_model_state_dict,
    get_optimizer_state_dict,
    init_device_mesh,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def run_page(blocks, folder):
    *wrappings, checkpoints = blocks
    steps = []
    for number, block in enumerate(wrappings):
        torch.manual_seed(0)
        names = {value.__name__: value for value in NAMES} | {
            "make_model": GPT,
            "device": "cpu",
            "world_size": dist.get_world_size(),
            "dcp": dcp,
            "folder": f"{folder}/{number}",
        }
        exec(block, names)
        for _ in range(11):
            names["opt"].zero_grad()
            names["model"](*data(4))[1].backward()
            names["opt"].step()
        exec(checkpoints, names)
        books = names["opt"].param_groups[0]
        steps.append((books["step"], books["refreshes"]))
    return steps


def test_page(tmp_path):
    """An example that nobody has run."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 3
    assert teams.run(2, run_page, blocks=blocks, folder=str(tmp_path)) == [[(11, 2)] * 2] * 2
