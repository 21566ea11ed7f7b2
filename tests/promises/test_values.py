"""What the constructor and ``add_param_group`` accept and refuse: every message once, with name and value."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import sophia
from reference import Given
from sophia import Sophia


def parameter(*shape):
    return nn.Parameter(torch.ones(shape or (3,)))


def sophia_of(parameters=None, **settings):
    return Sophia([parameter()] if parameters is None else parameters, **{"mode": "manual", **settings})


NAN, INF = math.nan, math.inf

# setting -> (bad value, what the message must contain beside the value)
BAD = [
    ("lr", -1e-3, "lr=-0.001: expected a finite number at least 0"),
    ("lr", NAN, "lr=nan: expected a finite number"),
    ("lr", INF, "lr=inf: expected a finite number"),
    ("lr", "1e-3", "lr='1e-3': expected a number"),
    ("lr", None, "lr=None: expected a number"),
    ("lr", torch.tensor(-1.0), "lr=tensor(-1.): expected a finite number at least 0"),
    ("lr", torch.tensor([0.1, 0.1]), "Tensor lr must be 1-element, but this one has 2"),
    ("betas", (0.9,), "betas=(0.9,): give two numbers"),
    ("betas", (0.9, 0.99, 0.999), "betas=(0.9, 0.99, 0.999): give two numbers"),
    ("betas", 0.9, "betas=0.9: give two numbers"),
    ("betas", (1.0, 0.99), "betas[0]=1.0: expected a finite number at least 0 and below 1"),
    ("betas", (-0.1, 0.99), "betas[0]=-0.1: expected a finite number at least 0 and below 1"),
    ("betas", (0.9, 1.0), "betas[1]=1.0: expected a finite number at least 0 and below 1"),
    ("betas", (0.9, NAN), "betas[1]=nan: expected a finite number"),
    ("gamma", 0.0, "gamma=0.0: expected a finite number above 0"),
    ("gamma", -0.05, "gamma=-0.05: expected a finite number above 0"),
    ("gamma", INF, "gamma=inf: expected a finite number above 0"),
    ("eps", 0.0, "eps=0.0: expected a finite number above 0"),
    ("eps", -1e-12, "eps=-1e-12: expected a finite number above 0"),
    ("weight_decay", -0.1, "weight_decay=-0.1: expected a finite number at least 0"),
    ("weight_decay", NAN, "weight_decay=nan: expected a finite number at least 0"),
    ("update_every", 0, "update_every=0: h is renewed every so many steps, a whole number from 1"),
    ("update_every", -3, "update_every=-3: h is renewed"),
    ("update_every", 10.0, "update_every=10.0: h is renewed"),
    ("update_every", True, "update_every=True: h is renewed"),
]
BAD_FOR_ALL = [
    ("fraction", 0.0, "fraction=0.0: expected a finite number above 0"),
    ("fraction", 1.5, "fraction=1.5: the share of the batch used for a refresh is at most 1"),
    ("fraction", "half", "fraction='half': expected a number"),
    ("mode", "auto", "mode='auto' is unknown: give one of 'replay', 'manual'"),
    ("state_dtype", torch.float16, "state_dtype=torch.float16 is unknown: give one of torch.float32"),
    ("estimator", "gnn", "estimator='gnn' is unknown: give 'gnb', 'hutchinson', 'empirical_fisher' or an"),
    ("likelihood", "softmax", "likelihood='softmax' is unknown"),
]


def ids(cases):
    return [f"{name}={value!r}"[:40] for name, value, _ in cases]


@pytest.mark.parametrize(("name", "value", "message"), BAD + BAD_FOR_ALL, ids=ids(BAD + BAD_FOR_ALL))
def test_bad_value_is_refused_with_name_and_value(name, value, message):
    """A typing mistake that trains, differently from what was meant, or fails hours later."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        sophia_of(**{name: value})


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=ids(BAD))
def test_bad_value_in_a_group_is_refused_and_nothing_is_added(name, value, message):
    """A group that is half added after an error that the caller caught."""
    first, late = parameter(), parameter()
    opt = sophia_of([first])
    before = repr(opt.state_dict())
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        opt.add_param_group({"params": [late], name: value})
    assert repr(opt.state_dict()) == before
    opt.add_param_group({"params": [late]})  # it is not taken for a duplicate
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        sophia_of([{"params": [parameter()]}, {"params": [parameter()], name: value}])


EDGES = [
    {"lr": 0.0},
    {"lr": 1},
    {"lr": np.float64(1e-3)},
    {"lr": torch.tensor(1e-3)},
    {"lr": torch.tensor([1e-3])},
    {"lr": torch.tensor([[1e-3]], dtype=torch.float64)},
    {"betas": [0.9, 0.99]},
    {"betas": (0.0, 0.0)},
    {"weight_decay": 0},
    {"gamma": 1e6},
    {"eps": 1e-30},
    {"update_every": 1},
    {"fraction": 1},
    {"state_dtype": torch.float64},
    {"state_dtype": torch.bfloat16},
    {"stochastic_rounding": True},
    {"estimator": "hutchinson"},
    {"estimator": "empirical_fisher"},
    {"estimator": Given()},
    {"likelihood": "bernoulli"},
    {"likelihood": sophia.likelihoods.Gaussian()},
    {"foreach": True},
    {"foreach": False, "fused": False},  # what torchtitan passes to every optimizer
    {"foreach": None, "fused": None},
    {"fused": True},
    {"fused": False},
    {"capturable": True},
    {"differentiable": True, "foreach": False},
    {"differentiable": True, "capturable": True},
    {"maximize": True},
]


@pytest.mark.parametrize("settings", EDGES, ids=lambda s: re.sub(" object at 0x[0-9a-f]+", "", str(s)))
def test_edge_of_what_is_meant_is_accepted(settings):
    """A check that is too strict: 0 is a learning rate of every warm-up, integers are numbers."""
    leaf = parameter()
    p = leaf.clone() if settings.get("differentiable") else leaf
    opt = sophia_of([p], **settings)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(before, p.detach()) == (settings.get("lr") == 0.0)
    assert p.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"differentiable": True, "fused": True}, "differentiable=True runs tensor by tensor"),
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True, "foreach": True}, "differentiable=True runs tensor by tensor"),
    ],
    ids=str,
)
def test_paths_that_do_not_go_together(settings, message):
    """A request that is silently not met; torch raises RuntimeError for these, so code may expect it."""
    with pytest.raises(RuntimeError, match="^" + message):
        sophia_of(**settings)


def test_what_is_optimized():
    """Unclear errors for the first thing a user writes."""
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got parameters but no model, .*Sophia\(model, ...\)"):
        Sophia([*model.parameters(), *other.parameters()])
    with pytest.raises(ValueError, match="got two models"):
        Sophia(model, model=other)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        sophia_of([])
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad=True"):
        Sophia(model.requires_grad_(False))
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        sophia_of(parameter())
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        sophia_of([parameter() * 2])
    with pytest.raises(TypeError, match="unexpected keyword argument 'rho'"):
        sophia_of(rho=0.04)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        sophia_of([{"params": list(other.parameters())}, {"params": [other.weight]}])


def test_complex_parameters_are_refused_and_nothing_is_added():
    """Curvature of a complex coordinate means nothing; the error must not leave half a group."""
    complex_one = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="does not support complex parameters"):
        sophia_of([complex_one])
    opt = sophia_of([parameter()])
    with pytest.raises(ValueError, match="does not support complex parameters"):
        opt.add_param_group({"params": [parameter(), complex_one]})
    assert len(opt.param_groups) == 1


def test_model_decays_matrices_only():
    """Decay on biases, norms and scalars is not the paper's, and nobody would notice."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1))
    model[1].bias.requires_grad_(False)
    opt = Sophia(model, weight_decay=0.2)
    by_decay = {group["weight_decay"]: group["param_names"] for group in opt.param_groups}
    assert by_decay == {
        0.2: ["0.weight", "1.weight", "3.weight"],
        0.0: ["1.bias", "2.weight", "2.bias", "3.bias"],
    }
    assert [g["weight_decay"] for g in Sophia(nn.LayerNorm(4), weight_decay=0.2).param_groups] == [0.0]


def test_vectors_in_disguise_are_not_decayed():
    """Gains and length scales of shape (n, 1) and (1, 1) are pulled to zero; weights of that shape should."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model = nn.ModuleDict({"normed": normed, "slope": nn.Linear(1, 3), "out": nn.Linear(3, 1)})
    model.raw_lengthscale = nn.Parameter(torch.zeros(1, 1))
    by_decay = {
        g["weight_decay"]: set(g["param_names"]) for g in Sophia(model, weight_decay=0.2).param_groups
    }
    gain, direction = (f"normed.parametrizations.weight.original{i}" for i in (0, 1))
    assert dict(model.named_parameters())[gain].shape == (3, 1)
    assert by_decay[0.2] == {direction, "slope.weight", "out.weight"}
    assert {gain, "raw_lengthscale"} <= by_decay[0.0]


SIGNATURE = """model_or_params, lr=0.0006, *by_position, betas=None, gamma=None, eps=None, weight_decay=0.1,
model=None, rule='paper', damping=None, update_every=None, fraction=0.125, batch_dim=None, estimator='gnb',
likelihood='categorical', mode='replay', seed=0, logits_fn=None, mask_fn=None, copy_inputs=False,
process_group=None, state_dtype=torch.float32, stochastic_rounding=False, maximize=False,
foreach=None, fused=None, capturable=False, differentiable=False"""


def test_what_none_stands_for():
    """The paper's numbers for the published rule, others for our own."""
    settings = ("betas", "gamma")
    model = nn.Linear(2, 2)
    assert [Sophia(model).defaults[n] for n in settings] == [(0.96, 0.99), 0.05]
    assert [Sophia(model, rule="damped").defaults[n] for n in settings] == [(0.9, 0.9), 0.2]
    assert Sophia(model, rule="damped", gamma=0.3, betas=(0.8, 0.7)).defaults["gamma"] == 0.3


def test_signature():
    """A name, an order or a default changed: every positional call and every recipe means something else."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(Sophia).parameters.values()]
    found = str(inspect.Signature(parameters)).strip("()").replace("\n", " ")
    assert found == SIGNATURE.replace("\n", " ").strip("()")


def test_defaults_live_in_every_group():
    """Schedulers, loggers and checkpoints look for the settings in the groups, under torch's names."""
    opt = sophia_of([{"params": [parameter()]}, {"params": [parameter()], "lr": 1.0}])
    torchs = set(torch.optim.AdamW([parameter()]).param_groups[0]) - {"amsgrad", "decoupled_weight_decay"}
    for group in opt.param_groups:
        assert torchs <= set(group)
        assert set(opt.defaults) <= set(group)
    assert [g["lr"] for g in opt.param_groups] == [6e-4, 1.0]


def test_public_names():
    """A name that disappears from ``import sophia``."""
    assert set(sophia.__all__) == {
        "Sophia",
        "SophiaWarning",
        "__version__",
        "advice",
        "curvature",
        "likelihoods",
    }
    assert all(hasattr(sophia, name) for name in sophia.__all__)
    assert issubclass(Sophia, torch.optim.Optimizer)
    assert issubclass(sophia.SophiaWarning, RuntimeWarning)
