"""Forwards that no hook sees: what is said, and that the way out which is named works."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from tiny import LabelsFromLogits, estimate_in_state, oracle, relative_error


class Policy(nn.Module):
    """Actor and critic; acting calls it, the training calls ``evaluate_actions``, as PPO does."""

    def __init__(self):
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def logits(self, x):
        return self.actor(torch.tanh(self.body(x)))

    def forward(self, x):
        return torch.distributions.Categorical(logits=self.logits(x)).sample()

    def evaluate_actions(self, x, actions):
        value = self.critic(torch.tanh(self.body(x)))
        return value, F.log_softmax(self.logits(x), -1).gather(-1, actions[:, None])


def loss_of(policy, x, actions):
    value, of_action = policy.evaluate_actions(x, actions)
    advantages = torch.linspace(-1, 1, len(x))[:, None]
    return 0.5 * value.square().mean() - (advantages * of_action).mean()


@pytest.fixture
def rollout():
    return torch.randn(12, 3), torch.randint(0, 4, (12,))


@pytest.mark.parametrize("given", ["the module", "its parameters"])
def test_another_method_is_told_with_the_way_out(rollout, given):
    """Words about training mode alone, where the model is in training mode and was run."""
    policy = Policy()
    opt = Sophia(policy if given == "the module" else policy.parameters())
    loss_of(policy, *rollout).backward()
    with pytest.raises(RuntimeError, match=r"another method.*hp\.sampled_loss.*estimator='hutchinson'"):
        opt.step()


def test_the_policy_by_hand_is_the_fisher_of_its_actions(rollout):
    """The first way that the error names, ``hp.sampled_loss(logits)``."""
    policy, (x, actions) = Policy(), rollout
    expected, count = oracle(policy, x, torch.ones(12, dtype=torch.bool), lambda m, x: m.logits(x))
    opt = Sophia(policy, mode="manual", likelihood=LabelsFromLogits())
    with opt.hessian_pass() as hp:
        hp.sampled_loss(policy.logits(x)).backward()
    loss_of(policy, x, actions).backward()
    opt.step()
    assert opt.stats()["B"] == count == 12
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def test_the_loss_alone_by_hand(rollout):
    """The second way, with Hutchinson: value and policy together."""
    policy = Policy()
    opt = Sophia(policy, mode="manual", estimator="hutchinson")
    with opt.hessian_pass() as hp:
        hp.add(loss_of(policy, *rollout), count=12)
    loss_of(policy, *rollout).backward()
    opt.step()
    assert opt.stats()["refreshes"] == 1
    assert bool(opt.state[policy.critic.weight]["hessian"].any())
