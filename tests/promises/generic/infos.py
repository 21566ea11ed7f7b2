"""Sophia as torch's own test machinery sees it: one ``OptimizerInfo``, with inputs that work and inputs that
fail.

torch's generic optimizer tests (its file test/test_optim.py) are not part of the installed package; the
machinery that they are written with is. The tests of this folder have their names, and are written anew over
the info below. ``docs/reliability.md`` lists which of torch's have no counterpart here, and why.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from hypothesis import settings
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from reference import Given, noise_like
from sophia import Sophia
from sophia.step.kernels import fused_cpu

# Importing the machinery changes the whole process: hypothesis gets torch's profile (fewer, random examples),
# and torch.backends can be set inside a context only. Other tests run in this process too.
settings.load_profile("default run")
torch.backends.__dict__["__allow_nonbracketed_mutation_flag"] = True


def curvature(parameter):
    """Sharp, flat, zero and negative, as a function of the shape alone; not zero everywhere."""
    h = noise_like([parameter], 7, scale=2.0)[0].square()
    place = torch.arange(h.numel(), device=h.device).view(h.shape)
    return torch.where(place % 5 == 1, torch.zeros_like(h), torch.where(place % 5 == 3, -h, h))


class SophiaByHand(Sophia):
    """Sophia over bare parameters: manual mode, and a pass by hand before every due step.

    The generic tests have no model to record. The pass is a hook on ``step``, which copies do not inherit.
    """

    def __init__(self, params, *args, **settings):
        super().__init__(params, *args, **{"mode": "manual", "estimator": Given(curvature), **settings})
        self.register_step_pre_hook(renew)


def renew(optimizer, args, kwargs):
    """Run the pass that manual mode leaves to the user."""
    books = optimizer.param_groups[0]
    if books["step"] % books["update_every"] == 0:
        with optimizer.hessian_pass():
            pass


def inputs(device, dtype=None):
    """What the constructor is to be tried with; the flags that choose a path are added by the tests."""
    table = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "no weight_decay": {"weight_decay": 0.0},
        "weight_decay": {"weight_decay": 0.9},
        "maximize": {"maximize": True, "weight_decay": 0.0},
        "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1},
        "betas": {"betas": (0.8, 0.9)},
        "betas of zero: nothing is averaged": {"betas": (0.0, 0.0)},
        "large gamma: nothing is clipped": {"gamma": 50.0},
        "small gamma: everything is": {"gamma": 1e-6},
        "large eps": {"eps": 0.1},
        "a pass on every step": {"update_every": 1},
        "float64 state": {"state_dtype": torch.float64},
        "Tensor lr": {"lr": torch.tensor(0.001)},
        "capturable": {"capturable": True},
        "Tensor lr, capturable, weight_decay": {
            "lr": torch.tensor(0.001),
            "capturable": True,
            "weight_decay": 0.1,
        },
        "Tensor lr, capturable, maximize": {
            "lr": torch.tensor(0.001),
            "capturable": True,
            "maximize": True,
            "weight_decay": 0.0,
        },
    }
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in table.items()]


def inputs_that_round():
    """Settings that round by chance: they go with neither capturable nor differentiable, and the noise of a
    parameter depends on its number, so two optimizers are not one with two groups.
    """
    return [
        OptimizerInput(None, {"state_dtype": torch.bfloat16}, "bfloat16 state"),
        OptimizerInput(None, {"stochastic_rounding": True}, "stochastic rounding"),
    ]


def sparse_gradient():
    parameter = Parameter(torch.ones(3))
    parameter.grad = torch.ones(3).to_sparse()
    return [parameter]


def error_inputs(device, dtype):
    """What every optimizer of torch refuses, and what Sophia does."""
    if torch.device(device).type != "cpu":
        return []
    bad_values = [
        ({"lr": -1.0}, "lr=-1.0: expected a finite number at least 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0: expected a finite number at least 0 and below 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1"),
        ({"betas": 0.9}, "give two numbers"),
        ({"gamma": 0.0}, "gamma=0.0: expected a finite number above 0"),
        ({"eps": 0.0}, "eps=0.0: expected a finite number above 0"),
        ({"weight_decay": -0.5}, "weight_decay=-0.5"),
        ({"update_every": 0}, "update_every=0"),
        ({"state_dtype": torch.float16}, "state_dtype=torch.float16 is unknown"),
    ]
    cases = [
        (
            OptimizerInput(params=None, kwargs={"fused": True, "foreach": True}, desc="two paths at once"),
            RuntimeError,
            "`fused` and `foreach` cannot be `True` together",
            OptimizerErrorEnum.CONSTRUCTION_ERROR,
        ),
        (
            OptimizerInput(params=None, kwargs={"differentiable": True, "foreach": True}, desc="likewise"),
            RuntimeError,
            "differentiable=True runs tensor by tensor",
            OptimizerErrorEnum.CONSTRUCTION_ERROR,
        ),
        (
            OptimizerInput(
                params=None, kwargs={"differentiable": True, "state_dtype": torch.bfloat16}, desc="rounding"
            ),
            RuntimeError,
            "a rounding has no derivative",
            OptimizerErrorEnum.CONSTRUCTION_ERROR,
        ),
        (
            OptimizerInput(params=[torch.ones(2, dtype=torch.complex64)], kwargs={}, desc="complex"),
            ValueError,
            "Sophia does not support complex parameters",
            OptimizerErrorEnum.CONSTRUCTION_ERROR,
        ),
        (
            OptimizerInput(params=sparse_gradient(), kwargs={}, desc="sparse gradient"),
            RuntimeError,
            "Sophia does not support sparse gradients",
            OptimizerErrorEnum.STEP_ERROR,
        ),
    ]
    cases += [
        (
            OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)),
            ValueError,
            text,
            OptimizerErrorEnum.CONSTRUCTION_ERROR,
        )
        for kwargs, text in bad_values
    ]
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(given, error_on=moment, error_type=kind, error_regex=text)
        for given, kind, text, moment in cases
    ]


SCHEDULERS = (
    [lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9)],
    [lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4)],
    [
        lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
    ],
    [
        lambda opt: lr_scheduler.ConstantLR(opt, factor=0.4, total_iters=4),
        lambda opt: lr_scheduler.PolynomialLR(opt, power=0.9, total_iters=40),
    ],
    [lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.01, total_steps=30)],
)

optim_db = [
    OptimizerInfo(
        SophiaByHand,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "fused", "differentiable"),
        # What later versions may add to a group: a file without them must load.
        not_og_supported_flags=("foreach", "fused", "differentiable", "capturable", "maximize", "joined"),
        supports_sparse=False,
        supports_complex=False,
        has_capturable_arg=True,
        supports_fused_on=() if fused_cpu.unavailable() else ("cpu",),
    )
]


def every_path(optim_info, device, *, skip=(), more=()):
    """All inputs, and ``more``, each with no path asked for, with each path forced, and with none of the fast
    ones.

    torch has a function for this too; it leaves foreach out on a CPU, where torch has no kernels for it.
    """
    flags = [flag for flag in optim_info.supported_impls if flag not in skip]
    if torch.device(device).type not in optim_info.supports_fused_on and "fused" in flags:
        flags.remove("fused")
    off = dict.fromkeys(flags, False)
    choices = [{}, off, *({**off, flag: True} for flag in flags)]
    return [
        OptimizerInput(
            params=None, kwargs={**deepcopy(given.kwargs), **choice}, desc=f"{given.desc} {choice}"
        )
        for given in (*optim_info.optim_inputs_func(device=device), *more)
        for choice in choices
    ]
