"""torch.distributed.checkpoint: saved at two ranks, loaded at one and four; a resumed run is the same."""

import layouts
import pytest
import teams
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import plain, sophia
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from sophia import Sophia
from tiny import GPT, data

K = 3


def build(layout):
    """Model and optimizer, with labels from the real sampler; a layout may name a rule: "shards, damped"."""
    layout, _, rule = layout.partition(", ")
    model = {
        "plain": GPT,
        "ddp": lambda: DistributedDataParallel(GPT()),
        "shards": layouts.sharded,
        "hybrid": layouts.hybrid,
        "flat": lambda: layouts.flat(use_orig_params=True),
    }[layout]()
    return model, Sophia(model, lr=1e-3, update_every=K, seed=3, rule=rule or "paper")


def train(model, opt, steps):
    x, y = data(16)
    size, rank = dist.get_world_size(), dist.get_rank()
    place = slice(rank * 16 // size, (rank + 1) * 16 // size)
    for _ in range(steps):
        opt.zero_grad()
        model(x[place], y[place])[1].backward()
        opt.step()


def contents(model, opt):
    """Everything, whole, by name: parameters, m, h."""
    found = {}
    for name, p in model.named_parameters():
        for key, tensor in {"theta": p, **opt.state[p]}.items():
            found[f"{layouts.clean(name)}.{key}"] = plain(tensor).detach().clone()
    return found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def straight_and_resumed(layout, cut, folder):
    model, opt = build(layout)
    train(model, opt, 2 * K + 1)
    first, first_opt = build(layout)
    train(first, first_opt, cut)
    weights, states = get_state_dict(first, first_opt)
    dcp.save({"model": weights, "opt": states}, checkpoint_id=folder)

    second, second_opt = build(layout)
    before = [local.clone() for local in layouts.bits(second.parameters())]
    weights, states = get_state_dict(second, second_opt)
    made_for_loading = layouts.same_bits(before, layouts.bits(second.parameters()))
    counted = (
        second_opt.param_groups[0]["step"],
        second_opt.stats()["refreshes"],
        second_opt.stats()["skipped"],
    )
    loaded = {"model": weights, "opt": states}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(second, second_opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    train(second, second_opt, 2 * K + 1 - cut)
    return {
        "lazy": made_for_loading and counted == (0, 0.0, 0.0),
        "equal": equal(contents(model, opt), contents(second, second_opt)),
        "books": [g["step"] for g in second_opt.param_groups] == [g["step"] for g in opt.param_groups],
        "refreshes": second_opt.stats()["refreshes"] == opt.stats()["refreshes"],
    }


@pytest.mark.parametrize("cut", range(1, K + 2))
@pytest.mark.parametrize("layout", ["shards", "ddp", "shards, damped"])
def test_resume_is_bit_equal_at_every_phase(layout, cut, tmp_path):
    """Noise, age or step that a checkpoint does not carry; an empty step of the loader that was counted."""
    for result in teams.run(2, straight_and_resumed, layout=layout, cut=cut, folder=str(tmp_path)):
        assert result == {"lazy": True, "equal": True, "books": True, "refreshes": True}


def save(layout, folder, reference):
    model, opt = build(layout)
    train(model, opt, K + 2)
    weights, states = get_state_dict(model, opt)
    dcp.save({"model": weights, "opt": states}, checkpoint_id=folder)
    everything = contents(model, opt)
    if dist.get_rank() == 0:
        torch.save(everything, reference)


def load(layout, folder, reference):
    model, opt = build(layout)
    weights, states = get_state_dict(model, opt)
    loaded = {"model": weights, "opt": states}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["opt"])
    same = equal(contents(model, opt), torch.load(reference))
    train(model, opt, K)  # and it goes on
    return same, opt.param_groups[0]["step"], opt.stats()["refreshes"]


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, "plain"), (1, "shards"), (4, "shards"), (4, "hybrid"), (4, "ddp"), (4, "shards, damped")],
)
def test_saved_at_two_ranks_loaded_at_another_number(size, layout, tmp_path):
    """A run that can only go on with as many ranks as it began with."""
    folder, reference = str(tmp_path / "saved"), str(tmp_path / "reference.pt")
    _, _, rule = layout.partition(", ")
    saved = f"shards, {rule}" if rule else "shards"
    teams.run(2, save, layout=saved, folder=folder, reference=reference)
    for same, step, refreshes in teams.run(size, load, layout=layout, folder=folder, reference=reference):
        assert same
        assert step == 2 * K + 2
        assert refreshes == 3.0


def full_and_back(layout, cpu_offload):
    """A whole state on rank 0 and back: what many trainers write as one file."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    model, opt = build(layout)
    train(model, opt, K + 2)
    states = get_optimizer_state_dict(model, opt, options=options)
    again, again_opt = build(layout)
    with torch.no_grad():
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=cpu_offload)
    set_optimizer_state_dict(again, again_opt, states, options=options)
    if layout == "flat":  # its parameters are shards of flat vectors: compare those
        same = all(
            torch.equal(opt.state[p][k], again_opt.state[q][k])
            for p, q in zip(model.parameters(), again.parameters(), strict=True)
            for k in ("exp_avg", "hessian")
            if p.numel()
        )
    else:
        same = equal(contents(model, opt), contents(again, again_opt))
    return same, again_opt.param_groups[0]["step"]


@pytest.mark.parametrize("cpu_offload", [False, True], ids=["on all ranks", "on rank 0"])
@pytest.mark.parametrize("layout", ["shards", "ddp", "flat"])
def test_full_state_dict(layout, cpu_offload):
    """A state written as one file that cannot be read back into shards."""
    if layout == "flat" and cpu_offload:
        pytest.skip("torch does not broadcast the state of FSDP1's flat parameters: AdamW's is lost as well")
    for same, step in teams.run(2, full_and_back, layout=layout, cpu_offload=cpu_offload):
        assert same
        assert step == K + 2


def whole_into_shards():
    """A single-process ``opt.state_dict()`` into a sharded model, without any helper."""
    alone = GPT()
    opt = Sophia(alone, process_group=False, update_every=K)
    x, y = data(4)
    for _ in range(2):
        opt.zero_grad()
        alone(x, y)[1].backward()
        opt.step()
    model = layouts.sharded()
    other = sophia(model, update_every=K)
    other.load_state_dict(opt.state_dict())
    return all(
        torch.equal(plain(other.state[q][k]), opt.state[p][k])
        for p, q in zip(alone.parameters(), model.parameters(), strict=True)
        for k in ("exp_avg", "hessian")
    )


def test_state_of_one_process_into_shards():
    """Whole tensors copied over shards, or refused."""
    assert teams.run(2, whole_into_shards) == [True, True]


def asked_for_state(situation):
    model = GPT()
    opt = Sophia(model, process_group=False, mode="manual" if situation == "manual" else "replay")
    if situation == "after a forward":
        model(*data(2))
    if situation == "a trained optimizer":
        train(model, opt, 1)
        opt.zero_grad()
    get_optimizer_state_dict(model, opt)
    books = opt.param_groups[0]
    return (
        len(opt.state) == len(list(model.parameters())),
        books["step"],
        opt.stats()["refreshes"],
        books["lr"],
    )


@pytest.mark.parametrize(
    ("situation", "step"),
    [("fresh", 0), ("manual", 0), ("after a forward", 0), ("a trained optimizer", 1)],
)
def test_lazy_initialisation(situation, step):
    """The empty step that makes state to load into: raised, as nothing was recorded, or counted."""
    for found in teams.run(2, asked_for_state, situation=situation):
        assert found == (True, step, float(step), 6e-4)


def asked_alone():
    model, opt = build("shards, damped")
    if dist.get_rank() == 0:
        _init_optim_state(opt)
    train(model, opt, 1)
    return opt.param_groups[0]["step"], len(opt.state) == len(list(model.parameters()))


def test_one_rank_may_ask_alone():
    """The rms of whole tensors is a collective, for which the rank that asks would wait for ever."""
    assert teams.run(2, asked_alone) == [(1, True)] * 2


def warm_up_from_zero():
    """A true first step with lr = 0 is a step: it has recordings, and its gradients are not zero."""
    model = GPT()
    opt = Sophia(model, lr=0.0, process_group=False)
    train(model, opt, 1)
    return opt.param_groups[0]["step"], opt.stats()["refreshes"]


def test_a_first_step_with_lr_zero_counts():
    """Warm-up schedules begin at lr = 0; their first refresh must not be lost."""
    assert teams.run(2, warm_up_from_zero) == [(1, 1.0)] * 2
