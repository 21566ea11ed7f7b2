"""A run that lost a rank goes on from its last checkpoint as if nothing had happened."""

import os
import signal
import time

import teams
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import share
from test_sharded_checkpoints import K, build, contents, equal, train
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

STEPS = 2 * K + 2


def train_until_a_rank_is_killed(folder):
    """A checkpoint after every step; rank 1 ends between the backward and the step that is due."""
    model, opt = build("ddp")
    for step in range(STEPS):
        if step == 2 * K:
            x, y, _ = share(padded=False)
            opt.zero_grad()
            model(x, y)[1].backward()
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            opt.step()
        train(model, opt, 1)
        weights, states = get_state_dict(model, opt)
        dcp.save({"model": weights, "opt": states}, checkpoint_id=f"{folder}/{step + 1}")


def resumed_and_straight(folder):
    straight, straight_opt = build("ddp")
    train(straight, straight_opt, STEPS)
    model, opt = build("ddp")
    weights, states = get_state_dict(model, opt)
    loaded = {"model": weights, "opt": states}
    last = max(int(name) for name in os.listdir(folder))
    dcp.load(loaded, checkpoint_id=f"{folder}/{last}")
    set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    train(model, opt, STEPS - last)
    same = equal(contents(model, opt), contents(straight, straight_opt))
    return last, same, opt.stats()["refreshes"]


def test_a_killed_rank_costs_one_step(tmp_path):
    """The survivor waits, or ends without a cause; or the resumed run is another one."""
    begun = time.monotonic()
    (kind, text), ended = teams.failures(2, train_until_a_rank_is_killed, within=100, folder=str(tmp_path))
    assert ended == ("ended", -signal.SIGKILL)
    assert kind == "raised"  # uncaught, it ends the process with code 1
    assert "rank 0 got no answer from the other ranks during a refresh of the Hessian" in text
    assert time.monotonic() - begun < 90
    for last, same, refreshes in teams.run(2, resumed_and_straight, within=100, folder=str(tmp_path)):
        assert last == 2 * K
        assert same
        assert refreshes == 3.0


def gradients_with_and_without(reshard):
    from layouts import bits, sharded, sophia

    found = []
    for attached in (False, True):
        model = sharded(reshard=reshard)
        opt = sophia(model) if attached else torch.optim.SGD(model.parameters(), lr=0.0)
        x, y, _ = share()
        model(x, y)[1].backward()
        before = bits(p.grad for p in model.parameters())
        opt.step()  # of the Sophia: with a refresh
        after = bits(p.grad for p in model.parameters())
        found.append((before, after))
    (alone, _), (before, after) = found
    return [all(torch.equal(a, b) for a, b in zip(alone, other, strict=True)) for other in (before, after)]


def test_sharded_gradients_are_those_of_a_run_without_sophia():
    """Hooks, or the pass, that change what the user's own backward leaves in ``.grad``."""
    for reshard in (True, False):
        assert teams.run(2, gradients_with_and_without, reshard=reshard) == [[True, True]] * 2
