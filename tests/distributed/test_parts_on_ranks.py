"""A list of chunks on several ranks: as many as there are on each rank, and the curvature of one process."""

import teams
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from tiny import LabelsFromLogits


class Chunks(nn.Module):
    """Logits in chunks of two positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.tokens = nn.Linear(4, 6), nn.Linear(6, 9)

    def forward(self, x):
        return [self.tokens(torch.tanh(self.trunk(part))) for part in x.split(2, 1)]


def h(model, rows, length, group):
    """One refresh of rows of which no more than ``length`` positions are given to the model."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 6, 4, generator=g), torch.randint(0, 9, (4, 6), generator=g)
    y[:2, 2:] = y[2:, 4:] = -100  # four labels in the first two rows, eight in the others
    opt = Sophia(model, likelihood=LabelsFromLogits(), fraction=1.0, lr=0.0, process_group=group)
    z, y = torch.cat(model(x[rows, :length]), 1), y[rows, :length]
    weights = torch.tensor([0.5, 0.5, 0.25, 0.25])[rows] / 4 * (1 if group is False else 2)
    losses = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    (losses * weights[:, None]).sum().backward()
    opt.step()
    return torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]), opt.stats()["B"]


def together_and_alone():
    """One chunk on the first rank, three on the second."""
    first = dist.get_rank() == 0
    rows, length = (slice(0, 2), 2) if first else (slice(2, 4), 6)
    found, count = h(DistributedDataParallel(Chunks()), rows, length, None)
    expected, whole = h(Chunks(), slice(0, 4), 6, False)
    return float((found - expected).norm() / expected.norm()), count, whole


def test_chunks_are_counted_over_all_ranks():
    """Ranks with more chunks than others left waiting, or chunks with the scale of one rank."""
    for error, count, whole in teams.run(2, together_and_alone):
        assert count == whole == 4 + 8
        assert error < 1e-5
