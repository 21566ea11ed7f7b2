"""Models and batches of the comparisons in ``protocols``, for ``sophia bench --model cells:large_batch`` (run
in this folder). The tokens are random: a step's cost does not depend on them.
"""

import torch
from torch import Tensor, nn

from sophia.lab.config.run import Model
from sophia.lab.models import build


def _cell(batch: int, *, layers: int = 2, width: int = 96) -> tuple[nn.Module, dict[str, Tensor]]:
    model = build.build(Model(layers=layers, width=width, heads=4, context=64, vocabulary=4096), seed=1)
    ids = torch.randint(4096, (batch, 64), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "labels": ids}


def half_million() -> tuple[nn.Module, dict[str, Tensor]]:
    """0.6M parameters, 1,024 tokens a step."""
    return _cell(16)


def large_batch() -> tuple[nn.Module, dict[str, Tensor]]:
    """0.6M parameters, 8,192 tokens a step."""
    return _cell(128)


def million() -> tuple[nn.Module, dict[str, Tensor]]:
    """1.1M parameters, 1,024 tokens a step."""
    return _cell(16, layers=3, width=128)
