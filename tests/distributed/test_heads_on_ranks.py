"""Several outputs on several ranks: each head's count is that of all ranks."""

import teams
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from sophia.likelihoods import Gaussian, Heads
from tiny import LabelsFromLogits


class SignOfOutput(Gaussian):
    """Noise that is a function of the output, so that layouts can be compared exactly."""

    def sampled_gradient(self, outputs, mask, generator, *, scale=1.0):
        return torch.where(outputs > 0, 1.0, -1.0) * mask * (-scale / self.sigma)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.tokens, self.value = nn.Linear(4, 6), nn.Linear(6, 9), nn.Linear(6, 1)

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return {"logits": self.tokens(hidden), "value": self.value(hidden).squeeze(-1)}


def h(model, rows, group):
    """One refresh; the rows from the sixth on have a value, unlike the others."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=g), torch.randint(0, 9, (8,), generator=g)
    parts = {"logits": LabelsFromLogits(), "value": SignOfOutput()}
    opt = Sophia(
        model, likelihood=Heads(parts, weights={"value": 0.3}), fraction=1.0, lr=0.0, process_group=group
    )
    output = model(x[rows])
    valued = torch.arange(8)[rows] >= 5
    # The mean over all rows, as a mean over the ranks.
    ranks = 2 if group is None else 1
    loss = F.cross_entropy(output["logits"], y[rows], reduction="sum") * ranks / 8
    loss = loss + 0 * output["value"].sum()
    (loss + output["value"][valued].square().sum()).backward()
    opt.step()
    return torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]), opt.stats()["B"]


def together_and_alone():
    rank = dist.get_rank()
    rows = slice(0, 3) if rank == 0 else slice(3, 8)  # no value on rank 0
    found, count = h(DistributedDataParallel(Model()), rows, None)
    expected, whole = h(Model(), slice(0, 8), False)
    return float((found - expected).norm() / expected.norm()), count, whole


def test_each_head_is_counted_over_all_ranks():
    """Heads whose counts differ between the ranks would be mixed with the scale of one of them."""
    for error, count, whole in teams.run(2, together_and_alone):
        assert count == whole == 8 + 3
        assert error < 1e-5
