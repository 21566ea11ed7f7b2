"""``state_dict``, ``load_state_dict``, pickles and copies: what is resumed continues bit for bit, what cannot
be resumed is refused whole.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sophia
from reference import Given, curvature_of, noise_like, set_curvature
from sophia import Sophia, SophiaWarning
from tiny import Bare, data


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = ((4, 3), (), (7,), (300, 300))
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def sophia_of(params, **changed):
    common = {"lr": 0.02, "betas": (0.9, 0.8), "weight_decay": 0.1, "update_every": 3, "estimator": Given()}
    return Sophia(params, mode="manual", **{**common, **changed})


def train(opt, params, steps, start=0):
    for step in range(start, start + steps):
        if step % 3 == 0:
            set_curvature(opt, curvature_of(params, step))
        for p, g in zip(params, noise_like(params, step), strict=True):
            p.grad = g
        opt.step()


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def snapshot(opt):
    """Everything that a failed load must leave as it was, comparable with ``==``."""
    state = {
        (i, name): tensor.clone().tolist()
        for i, s in opt.state_dict()["state"].items()
        for name, tensor in s.items()
    }
    return state, copy.deepcopy(opt.state_dict()["param_groups"]), [id(s) for s in opt.state.values()]


def assert_same(a, b, params_a, params_b):
    for p, q in zip(params_a, params_b, strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "hessian"):
            assert torch.equal(a.state[p][name], b.state[q][name])
            assert a.state[p][name].dtype == b.state[q][name].dtype
    books = [[{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] for opt in (a, b)]
    assert books[0] == books[1]


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_resumed_equals_uninterrupted_at_every_phase_of_the_interval(steps, dtype):
    """A run that is interrupted is another run than one that is not. The file is read with weights_only."""
    params = parameters(dtype)
    opt = sophia_of(params)
    train(opt, params, steps)
    resumed_params = copies(params)
    resumed = sophia_of(resumed_params, lr=9.0, gamma=1.0)
    with pytest.warns(SophiaWarning, match=r"its own settings.*gamma=0.05 \(not 1.0\)"):
        resumed.load_state_dict(through_a_file(opt.state_dict()))
    train(opt, params, 5, start=steps)
    train(resumed, resumed_params, 5, start=steps)
    assert_same(opt, resumed, params, resumed_params)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_resumed_noise_is_the_uninterrupted_noise(steps):
    """Sampled labels after a resume: they come from (seed, step), which the file must carry."""
    x, y = data(4)
    runs = []
    for stop in (None, steps):
        model = Bare(layers=1)
        opt = Sophia(model, mode="manual", lr=1e-3, seed=11, betas=(0.9, 0.5))
        for step in range(5):
            if step == stop:
                saved = through_a_file(opt.state_dict())
                opt = Sophia(model, mode="manual", lr=5.0, seed=0)
                with pytest.warns(SophiaWarning, match="its own settings"):
                    opt.load_state_dict(saved)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            with opt.hessian_pass() as hp:
                hp.sampled_loss(model(x)).backward()
            opt.step()
        runs.append((opt, list(model.parameters())))
    assert_same(runs[0][0], runs[1][0], runs[0][1], runs[1][1])


def test_state_dict_has_the_documented_keys_and_is_deterministic():
    """Other tools read these keys; a state_dict that differs from call to call cannot be compared."""
    params = parameters()
    opt = sophia_of(params)
    train(opt, params, 2)
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert list(state["state"]) == [0, 1, 2, 3]
    assert all(set(entries) == {"exp_avg", "hessian"} for entries in state["state"].values())
    again = opt.state_dict()
    assert repr(state) == repr(again)
    plain = (int, float, bool, str, type(None), tuple, list)
    assert all(isinstance(v, plain) for g in state["param_groups"] for v in g.values())


def test_loading_neither_changes_nor_aliases_what_is_loaded():
    """Two optimizers from one checkpoint (a sweep, an EMA copy) would train each other's state."""
    params = parameters()
    opt = sophia_of(params)
    train(opt, params, 2)
    state = copy.deepcopy(opt.state_dict())
    before = repr(state)
    others = [copies(params) for _ in range(2)]
    opts = [sophia_of(ps) for ps in others]
    for other in opts:
        other.load_state_dict(state)
    train(opts[0], others[0], 4, start=2)
    assert repr(state) == before
    train(opts[1], others[1], 4, start=2)
    assert_same(opts[0], opts[1], others[0], others[1])


@pytest.mark.parametrize("saved_named", [False, True])
def test_named_and_unnamed_load_into_each_other(saved_named):
    """Checkpoints from before a user named his parameters, and after."""
    params = parameters()
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    opt = sophia_of(named if saved_named else params)
    train(opt, params, 2)
    other_params = copies(params)
    other_named = [(f"p{i}", p) for i, p in enumerate(other_params)]
    other = sophia_of(other_params if saved_named else other_named)
    other.load_state_dict(opt.state_dict())
    train(opt, params, 3, start=2)
    train(other, other_params, 3, start=2)
    for p, q in zip(params, other_params, strict=True):
        assert torch.equal(p, q)


def test_half_precision_keeps_its_float32_state_through_a_file():
    """Torch's ``load_state_dict`` casts state to the parameters' dtype: h of 1e-11 would be zero after it."""
    for dtype in (torch.float16, torch.bfloat16):
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        opt = sophia_of([p], betas=(0.9, 0.0))
        exact = torch.tensor([1e-11, 1.0009765, 3.14159274])
        set_curvature(opt, [exact])
        other = sophia_of([nn.Parameter(torch.ones(3, dtype=dtype))], betas=(0.9, 0.0))
        other.load_state_dict(through_a_file(opt.state_dict()))
        (state,) = other.state.values()
        assert state["hessian"].dtype == torch.float32
        assert torch.equal(state["hessian"], exact)


def test_state_keeps_the_parameters_layout_through_a_file():
    """A contiguous h beside a channels_last parameter: the slow path for the rest of the run."""
    p = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    opt = sophia_of([p])
    train(opt, [p], 1)
    state = through_a_file(opt.state_dict())
    for entries in state["state"].values():
        entries.update({name: value.contiguous() for name, value in entries.items()})
    other = sophia_of([nn.Parameter(p.detach().clone(memory_format=torch.preserve_format))])
    other.load_state_dict(state)
    (found,) = other.state.values()
    assert all(found[name].stride() == p.stride() for name in found)
    assert torch.equal(found["hessian"], opt.state[p]["hessian"])


# ---- files of others


def foreign(kind, params):
    other = {
        "AdamW": lambda: torch.optim.AdamW(params),
        "AdamW before its first step": lambda: torch.optim.AdamW(params),
        "SGD": lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "SGD before its first step": lambda: torch.optim.SGD(params, lr=0.1),
    }[kind]()
    for p in params:
        p.grad = torch.ones_like(p)
    if "before" not in kind:
        other.step()
    return other.state_dict()


def reshaped(state):
    state["state"][0]["hessian"] = torch.ones(3, 4)


def without_hessian(state):
    del state["state"][1]["hessian"]


def not_a_tensor(state):
    state["state"][2]["exp_avg"] = 0.0


def fewer_groups(state):
    state["param_groups"].pop()


def fewer_parameters(state):
    state["param_groups"][0]["params"].pop()


def without_groups(state):
    del state["param_groups"]


BROKEN = {
    "wrong shape": (reshaped, r"hessian of parameter 0 has shape \(3, 4\), but the parameter has \(4, 3\)"),
    "missing buffer": (without_hessian, r"the state of parameter 1 has the keys \['exp_avg'\], but Sophia's"),
    "not a tensor": (not_a_tensor, "exp_avg of parameter 2 has shape float"),
    "fewer groups": (fewer_groups, "different number of parameter groups"),
    "fewer parameters": (fewer_parameters, "doesn't match the size of optimizer's group"),
    "no groups": (without_groups, r"lacks \['param_groups'\] and has \['state'\]"),
}
FOREIGN = {
    "AdamW": "an Adam's state, whose second moment, if it has one, is not a curvature. Start Sophia afresh",
    "AdamW before its first step": "no gamma: this is an Adam's state",
    "SGD": "no gamma: this is another optimizer's state",
    "SGD before its first step": "no gamma: this is another optimizer's state",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_state_of_another_optimizer_is_refused_whole(kind):
    """AdamW's settings, or its second moment in place of h, would train something that has no name."""
    params = parameters()
    opt = sophia_of(params)
    train(opt, params, 2)
    state, before = foreign(kind, copies(params)), snapshot(opt)
    with pytest.raises(ValueError, match=FOREIGN[kind]):
        opt.load_state_dict(state)
    assert snapshot(opt) == before
    train(opt, params, 2, start=2)  # and it still works


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_state_that_does_not_fit_is_refused_whole(damage, message):
    """A KeyError in the middle, or an optimizer that is half loaded after the caller caught the error."""
    params = parameters()
    opt = sophia_of(params)
    train(opt, params, 2)
    state = copy.deepcopy(opt.state_dict())
    damage(state)
    target = sophia_of(copies(params), lr=0.5)
    before = snapshot(target)
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(state)
    assert snapshot(target) == before
    train(opt, params, 2, start=2)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["step"] == 4


def test_a_whole_checkpoint_is_named_as_such():
    """The commonest slip: the dict that holds the model too."""
    opt = sophia_of(parameters())
    with pytest.raises(ValueError, match=r"has \['model', 'optimizer'\]. If it is a whole checkpoint"):
        opt.load_state_dict({"model": {}, "optimizer": opt.state_dict()})


@pytest.mark.parametrize("missing", ["joined", "capturable", "skipped", "fused", "differentiable", "foreach"])
def test_settings_that_older_files_lack_are_filled(missing):
    """A file of an earlier version that raises a KeyError in the first step."""
    params = parameters()
    opt = sophia_of(params)
    train(opt, params, 2)
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        del group[missing]
    other_params = copies(params)
    other = sophia_of(other_params)
    other.load_state_dict(state)
    train(opt, params, 2, start=2)
    train(other, other_params, 2, start=2)
    assert_same(opt, other, params, other_params)


def test_parameters_without_state_in_the_file_start_at_zero():
    """A layer that had no gradient yet when the file was written."""
    params = parameters()
    opt = sophia_of(params)
    train(opt, params, 1)
    state = copy.deepcopy(opt.state_dict())
    del state["state"][1]
    other_params = copies(params)
    other = sophia_of(other_params)
    other.load_state_dict(state)
    assert set(other.state) == {p for i, p in enumerate(other_params) if i != 1}
    other_params[1].grad = torch.ones(())
    other.step()
    torch.testing.assert_close(other.state[other_params[1]]["exp_avg"], torch.tensor(0.1))


# ---- hooks


def test_state_dict_hooks():
    """Checkpoint tools rewrite the state in these hooks (names, shards, precision)."""
    params = parameters()
    opt = sophia_of(params)
    train(opt, params, 2)
    order = []
    opt.register_state_dict_pre_hook(lambda o: order.append("pre"))
    opt.register_state_dict_post_hook(lambda o, state: {**state, "extra": order.append("post")})
    state = opt.state_dict()
    assert order == ["pre", "post"]
    assert "extra" in state
    other = sophia_of(copies(params))
    other.load_state_dict(state)  # keys beside the two do not disturb


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_hooks_rewrite_the_file_and_see_what_was_restored(dtype):
    """A hook that converts a foreign file, or changes m after loading, and is silently overruled."""
    params = parameters(dtype)
    opt = sophia_of(params)
    train(opt, params, 2)
    saved = copy.deepcopy(opt.state_dict())
    text = repr(saved)
    renamed = {"state": {k: {"m": s["exp_avg"], "h": s["hessian"]} for k, s in saved["state"].items()}}
    renamed["param_groups"] = saved["param_groups"]

    def convert(_, state):
        entries = {k: {"exp_avg": s["m"], "hessian": s["h"]} for k, s in state["state"].items()}
        return {**state, "state": entries}

    seen = []

    def after(optimizer):
        seen.extend(s["hessian"].dtype for s in optimizer.state.values())
        for s in optimizer.state.values():
            s["exp_avg"].zero_()

    other_params = copies(params)
    other = sophia_of(other_params)
    other.register_load_state_dict_pre_hook(convert)
    other.register_load_state_dict_post_hook(after)
    other.load_state_dict(renamed)
    assert set(seen) == {torch.float32}
    for p, q in zip(params, other_params, strict=True):
        assert torch.equal(other.state[q]["hessian"], opt.state[p]["hessian"])
        assert not other.state[q]["exp_avg"].any()
    assert repr(saved) == text  # the hook wrote into copies
    other.load_state_dict(renamed)  # and no hook of the optimizer's own has stayed behind
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


# ---- copies


def logits_of(output):
    return output


def every_prediction(args, kwargs, output):
    return torch.ones(output.shape[:-1], dtype=torch.bool)


def public(opt):
    # defaults and groups are compared by value, state by tensors
    skip = {"state", "param_groups", "estimator", "likelihood"}
    return {k: v for k, v in vars(opt).items() if not k.startswith("_") and k not in skip}


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o))}


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
def test_copies_have_the_same_attributes_and_the_same_future(copy_of):
    """Sweeps and look-ahead wrappers copy optimizers; a copy that lacks a setting trains differently."""
    params = parameters()
    opt = sophia_of(
        params,
        estimator=sophia.curvature.GaussNewtonBartlett(sophia.likelihoods.Bernoulli()),
        likelihood="bernoulli",
        fraction=0.25,
        state_dtype=torch.float64,
        logits_fn=logits_of,
        mask_fn=every_prediction,
        copy_inputs=True,
        process_group=False,
        seed=3,
    )
    for p, g in zip(params, noise_like(params, 0), strict=True):
        p.grad = g
    opt.step()
    twin = copy_of(opt)
    assert public(twin) == public(opt)
    assert type(twin.estimator) is type(opt.estimator)
    assert type(twin.likelihood) is type(opt.likelihood)
    twins = [p for g in twin.param_groups for p in g["params"]]
    assert not {id(p) for p in twins} & {id(p) for p in params}
    assert_same(opt, twin, params, twins)
    for both, ps in ((opt, params), (twin, twins)):
        for step in range(1, 4):
            with both.hessian_pass() as hp:
                hp.sampled_loss(ps[0] * (2 + ps[1] + ps[2].sum() + ps[3].mean())).backward()
            for p, g in zip(ps, noise_like(ps, step), strict=True):
                p.grad = g
            both.step()
    assert_same(opt, twin, params, twins)


@pytest.mark.parametrize("copy_of", COPIES.values(), ids=COPIES)
def test_copy_without_its_model_says_so_when_a_refresh_is_due(copy_of):
    """A copy that silently trains with the h it has, or refreshes from the original's model."""
    model, (x, y) = Bare(layers=1), data(4)
    opt = Sophia(model, lr=1e-3, update_every=2)
    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    opt.step()
    twin = copy_of(opt)
    params = [p for g in twin.param_groups for p in g["params"]]
    for p in params:
        p.grad = torch.zeros_like(p) + 1e-3
    twin.step()  # step 1: not due
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"due at step 2, but no model is attached .*opt.attach\(model\)"):
        twin.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_deepcopy_of_model_and_optimizer_together():
    """Both in one object, as trainers hold them: the copy's parameters must be the copied model's."""
    model = Bare(layers=1)
    opt = Sophia(model, mode="manual", lr=1e-3)
    other_model, other = copy.deepcopy((model, opt))
    owned = {id(p) for p in other_model.parameters()}
    assert all(id(p) in owned for g in other.param_groups for p in g["params"])


def asked_for(opt, parameters):
    """As ``torch.distributed.checkpoint`` asks for empty state, parameter by parameter (pytorch#192307)."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    rates = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    opt.zero_grad()


@pytest.mark.parametrize("trained", [0, 1, 3], ids="after {} steps".format)
def test_state_asked_for_parameter_by_parameter(trained):
    """It must be made for those that have none, and be no step: no refresh, no counter, nothing moved."""
    model, (x, y) = Bare(layers=1), data(4)
    late = [model.norm.weight, model.norm.bias]
    for p in late:
        p.requires_grad_(False)
    opt = Sophia(model, lr=1e-3, update_every=2)
    for _ in range(trained):
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        opt.step()
        opt.zero_grad()
    for p in late:
        p.requires_grad_(True)
    kept = {p: {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()}
    weights = [p.detach().clone() for p in model.parameters()]
    books = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    lacking = [p for p in model.parameters() if not opt.state.get(p)]
    asked_for(opt, lacking)  # a warning is an error here
    assert set(opt.state) == set(model.parameters())
    assert all(not t.any() for p in lacking for t in opt.state[p].values())
    assert all(torch.equal(opt.state[p][k], t) for p, s in kept.items() for k, t in s.items())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] == books


def test_a_skipped_batch_before_state_is_asked_for():
    """Its recordings, whose gradients the model's zero_grad threw away, would make the question a step."""
    model, (x, y) = Bare(layers=1), data(4)
    opt = Sophia(model, lr=1e-3)
    nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    model.zero_grad()
    asked_for(opt, model.parameters())
    assert opt.param_groups[0]["step"] == 0
    assert len(opt.state) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"gamma": 0.1}, r"gamma=0.05 \(not 0.1\)\. To go on"),
        (
            {"betas": (0.9, 0.9), "update_every": 5},
            r"betas=\(0.96, 0.99\) \(not .*update_every=10 \(not 5\)\.",
        ),
        ({"eps": 1e-9}, r"eps=1e-12 \(not 1e-09\)"),
    ],
    ids=str,
)
def test_settings_that_a_state_brings_along_are_named(other, said):
    """Advice such as "double gamma", done in the script, is undone by the resume in silence."""
    model = nn.Linear(2, 2)
    opt = Sophia(model, mode="manual", **other)
    with pytest.warns(SophiaWarning, match=said) as found:
        opt.load_state_dict(Sophia(model, mode="manual").state_dict())
    assert len(found) == 1


def test_a_peak_noted_by_a_scheduler_is_compared():
    """An lr changed in the script has no effect on a resume."""
    model = nn.Linear(2, 2)

    def build(lr):
        opt = Sophia(model, mode="manual", lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        return opt, scheduler

    old, scheduler = build(1e-3)
    for _ in range(3):
        old.step()
        scheduler.step()
    build(1e-3)[0].load_state_dict(old.state_dict())  # the same peak: no word
    Sophia(model, mode="manual", lr=1e-3).load_state_dict(old.state_dict())
    with pytest.warns(SophiaWarning, match=r"lr=0.001 \(not 0.0005\)"):
        build(5e-4)[0].load_state_dict(old.state_dict())


def test_what_a_schedule_wrote_raises_no_alarm():
    """A loop that sets lr itself, or cycles beta1, differs on every resume. Warnings are errors here."""
    model = nn.Linear(2, 2)
    old = Sophia(model, mode="manual", lr=1e-3)
    old.param_groups[0]["lr"] = 3e-4  # as nanoGPT does at every step
    Sophia(model, mode="manual", lr=1e-3).load_state_dict(old.state_dict())
    cycled = Sophia(model, mode="manual", lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(cycled, max_lr=1e-3, total_steps=10)
    Sophia(model, mode="manual", lr=1e-3).load_state_dict(cycled.state_dict())
