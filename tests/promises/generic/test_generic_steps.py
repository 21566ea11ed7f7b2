"""torch's generic tests of the step: paths agree, groups, rates, and what a step leaves alone."""

from copy import deepcopy

import torch
from infos import every_path, inputs_that_round, optim_db
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, TensorTracker, optims
from torch.testing._internal.common_utils import TestCase, parametrize

HALF = {torch.float16: 4e-2, torch.bfloat16: 4e-2}


def small_model(device, dtype):
    """Layers with an empty and a 0-dim parameter beside them, equal on every call."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()]
    model = torch.nn.Sequential(*layers).to(device=device, dtype=dtype)
    extra = [torch.rand(shape, device=device, dtype=dtype, requires_grad=True) for shape in ((), (0, 2))]
    for tensor in extra:
        tensor.grad = torch.rand_like(tensor)
    return model, [*model.parameters(), *extra]


class TestGenericSteps(TestCase):
    def check_warned_or_raised(self, kind, text, function):
        context = self.assertWarnsRegex if issubclass(kind, Warning) else self.assertRaisesRegex
        with context(kind, text):
            function()

    @optims(optim_db)
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        """The tests below add them: an info that has them already would hide a path."""
        for given in optim_info.optim_inputs_func(device=device):
            self.assertFalse({"foreach", "fused", "differentiable"} & set(given.kwargs))

    @optims(optim_db)
    def test_errors(self, device, dtype, optim_info):
        """Code that catches torch's errors, and users who read them."""
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = case.optimizer_error_input
            with self.subTest(given.desc):
                if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
                    self.check_warned_or_raised(
                        case.error_type,
                        case.error_regex,
                        lambda given=given: optim_info.optim_cls(given.params, **given.kwargs),
                    )
                else:
                    optimizer = optim_info.optim_cls(given.params, **given.kwargs)
                    self.check_warned_or_raised(case.error_type, case.error_regex, optimizer.step)

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @optims(optim_db)
    def test_goes_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        """A sign, a scheduler or a layout that turns descent into something else, on any path."""

        def tensor(*shape):
            if contiguous:
                return Parameter(torch.randn(shape, device=device, dtype=dtype))
            return Parameter(torch.randn((*shape, 2), device=device, dtype=dtype)[..., 0])

        for scheduler_inputs in optim_info.scheduler_inputs if with_lrsched else [()]:
            for given in every_path(optim_info, device, skip=("differentiable",)):
                weight, bias, x = tensor(10, 5), tensor(10), torch.randn(5, device=device, dtype=dtype)
                optimizer = optim_info.optim_cls([weight, bias], **given.kwargs)
                schedulers = [make(optimizer) for make in scheduler_inputs]

                def closure(optimizer=optimizer, weight=weight, bias=bias, x=x):
                    optimizer.zero_grad()
                    loss = (weight.mv(x) + bias).pow(2).sum()
                    loss.backward()
                    return loss

                start = closure().item()
                for _ in range(20):
                    loss = optimizer.step(closure).item()
                    for scheduler in schedulers:
                        scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
                compare = self.assertGreater if given.kwargs.get("maximize") else self.assertLess
                compare(closure().item(), start, given.desc)

    @optims(optim_db)
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        """A scheduler that reaches one group alone."""
        for scheduler_inputs in optim_info.scheduler_inputs:
            first, second = (Parameter(torch.randn((10, 5), device=device, dtype=dtype)) for _ in range(2))
            x = torch.randn(5, device=device, dtype=dtype)
            optimizer = optim_info.optim_cls([{"params": [first]}, {"params": [second], "lr": 0.01}])
            schedulers = [make(optimizer) for make in scheduler_inputs]
            before = [group["lr"] for group in optimizer.param_groups]
            losses = []
            for _ in range(20):
                optimizer.zero_grad()
                loss = (first.mv(x) + second.mv(x)).pow(2).sum()
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
                for scheduler in schedulers:
                    scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
            self.assertLess(losses[-1], losses[0])
            for group, lr in zip(optimizer.param_groups, before, strict=True):
                self.assertNotEqual(group["lr"], lr)

    @parametrize("num_dim", [0, 1, 2])
    @optims(optim_db)
    def test_tensor_lr(self, device, dtype, optim_info, num_dim):
        """Another rate, or a broadcast, for a lr that a compiled or captured step keeps in a tensor."""
        for given in every_path(optim_info, device, skip=("differentiable",)):
            x = torch.randn(5, device=device, dtype=dtype)
            start = torch.randn((10, 5), device=device, dtype=dtype)
            results = []
            for lr in (1e-3, torch.tensor(1e-3, device=device).reshape([1] * num_dim)):
                weight = Parameter(start.clone())
                optimizer = optim_info.optim_cls([weight], **{**given.kwargs, "lr": lr})
                for _ in range(5):
                    optimizer.zero_grad()
                    weight.mv(x).pow(2).sum().backward()
                    optimizer.step()
                results.append(weight)
            self.assertEqual(*results)

    def check_paths_agree(self, device, dtype, optim_info, flag):
        """Seven steps with the for-loop as the truth: a None gradient, a layer frozen and unfrozen.

        After every step the other path is set back to the truth, so that an error cannot hide in drift.
        """
        tolerance = HALF.get(dtype)
        tolerances = {} if tolerance is None else {"rtol": tolerance, "atol": tolerance}
        for given in (*optim_info.optim_inputs_func(device=device, dtype=dtype), *inputs_that_round()):
            x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], device=device, dtype=dtype).reshape(3, 2)
            off = {"foreach": False, "fused": False}
            made = [small_model(device, dtype) for _ in range(2)]
            opts = [
                optim_info.optim_cls(params, **{**deepcopy(given.kwargs), **off, flag: value})
                for (_, params), value in zip(made, (False, True), strict=True)
            ]
            for i in range(7):
                for (model, _), optimizer in zip(made, opts, strict=True):
                    optimizer.zero_grad()
                    model[2].requires_grad_(not 3 <= i < 5)
                    if i != 2:
                        model(x).sum().backward()
                    optimizer.step()
                tracker = TensorTracker(tolerances)
                (_, truth), (_, other) = made
                for p, q in zip(truth, other, strict=True):
                    for tensor in (p, *(opts[0].state[p][name] for name in ("exp_avg", "hessian"))):
                        tracker.add(tensor)
                    for tensor in (q, *(opts[1].state[q][name] for name in ("exp_avg", "hessian"))):
                        tracker.pop_check_set(tensor, self)
                self.assertTrue(tracker.all_popped())

    @optims(optim_db, dtypes=[torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        """The path that a GPU takes computing something else."""
        self.check_paths_agree(device, dtype, optim_info, "foreach")

    @optims(optim_db, dtypes=[torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        """The compiled path computing something else; dtypes that it does not take go another way."""
        if torch.device(device).type not in optim_info.supports_fused_on:
            self.skipTest("there is no compiled kernel for this device in this installation")
        self.check_paths_agree(device, dtype, optim_info, "fused")

    @optims(optim_db, dtypes=[torch.float64])
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        """``torch.set_default_dtype`` in somebody's script."""
        before = torch.get_default_dtype()
        for default in (torch.float64, torch.float16):
            torch.set_default_dtype(default)
            try:
                self.check_paths_agree(device, dtype, optim_info, "foreach")
            finally:
                torch.set_default_dtype(before)

    @parametrize("impl", ["foreach", "fused"])
    @optims(optim_db)
    def test_mixed_device_dtype(self, device, dtype, optim_info, impl):
        """Lists that mix dtypes (and, with a GPU, devices): the wrong neighbour, or an error."""
        if impl == "fused" and torch.device(device).type not in optim_info.supports_fused_on:
            self.skipTest("there is no compiled kernel for this device in this installation")
        dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        devices = {"cpu", torch.device(device).type}
        start = [torch.rand(2, 3, dtype=d, device=place) for d in dtypes for place in sorted(devices)]
        grads = [torch.rand_like(p) for p in start]
        for given in optim_info.optim_inputs_func(device=device):
            results = []
            for value in (False, True):
                params = [Parameter(p.clone()) for p in start]
                off = {"foreach": False, "fused": False}
                optimizer = optim_info.optim_cls(params, **{**deepcopy(given.kwargs), **off, impl: value})
                for _ in range(7):
                    for p, g in zip(params, grads, strict=True):
                        p.grad = g.clone()
                    optimizer.step()
                results.append((params, [optimizer.state[p] for p in params]))
            (params, states), (others, other_states) = results
            for p, q, state, other in zip(params, others, states, other_states, strict=True):
                rtol, atol = torch.testing._comparison.get_tolerances(p.dtype, rtol=None, atol=None)
                self.assertEqual(p, q, rtol=5 * rtol, atol=5 * atol)
                self.assertEqual(state, other)

    @optims(optim_db)
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        """Decay of one group in another: the vectors of every language model would shrink."""
        for given in every_path(optim_info, device, skip=("differentiable",)):
            first, second = (Parameter(torch.randn((10, 5), device=device, dtype=dtype)) for _ in range(2))
            alone = Parameter(second.detach().clone())
            settings = {**deepcopy(given.kwargs), "weight_decay": 0.3}
            groups = [{"params": [first]}, {"params": [second], "weight_decay": 0.0}]
            together = optim_info.optim_cls(groups, **settings)
            other = optim_info.optim_cls([alone], **{**deepcopy(settings), "weight_decay": 0.0})
            for step in range(5):
                for p, q in ((first, first), (second, alone)):
                    p.grad = torch.full_like(p, 0.1 * (step - 2))
                    q.grad = p.grad.clone()
                together.step()
                other.step()
            self.assertEqual(second, alone, rtol=0, atol=0)

    @optims(optim_db)
    def test_param_groups_lr(self, device, dtype, optim_info):
        """The default rate in a group that has its own, or the other way round."""
        for given in every_path(optim_info, device, skip=("differentiable",)):
            moved, still = (Parameter(torch.randn((4, 3), device=device, dtype=dtype)) for _ in range(2))
            before = moved.detach().clone(), still.detach().clone()
            lr = given.kwargs.pop("lr", 1e-3)
            optimizer = optim_info.optim_cls(
                [{"params": [moved], "lr": lr}, {"params": [still]}], **{**given.kwargs, "lr": 1e-28}
            )
            for _ in range(5):
                moved.grad, still.grad = torch.rand_like(moved), torch.rand_like(still)
                optimizer.step()
            self.assertEqual(still, before[1], rtol=0, atol=0)
            self.assertNotEqual(moved, before[0])

    @optims(optim_db)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        """Frozen parameters that decay."""
        for given in every_path(optim_info, device):
            params = [torch.randn(2, 3, device=device, dtype=dtype) for _ in range(2)]
            before = deepcopy(params)
            optimizer = optim_info.optim_cls(params, **given.kwargs)
            self.assertEqual(optimizer.step(lambda: 1), 1)
            self.assertEqual(params, before, rtol=0, atol=0)

    @optims(optim_db)
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        """0 / 0, or a step of lr for a gradient that is zero."""
        for given in every_path(optim_info, device):
            given.kwargs["weight_decay"] = 0.0
            param = torch.randn((5, 1), device=device, dtype=dtype)
            before = param.clone()
            param.requires_grad_(not given.kwargs.get("differentiable", False))
            optimizer = optim_info.optim_cls([param], **given.kwargs)
            param.grad = torch.zeros_like(param)
            for _ in range(3):
                optimizer.step()
            self.assertEqual(param.detach(), before, rtol=0, atol=0)

    @optims(optim_db)
    def test_grads_are_never_inplaced_into(self, device, dtype, optim_info):
        """Gradient clipping, logging and a second optimizer read ``.grad`` after the step."""
        for given in every_path(optim_info, device):
            param = torch.randn((5, 1), device=device, dtype=dtype)
            param.requires_grad_(not given.kwargs.get("differentiable", False))
            optimizer = optim_info.optim_cls([param], **given.kwargs)
            param.grad = torch.rand_like(param)
            value, version = param.grad.clone(), param.grad._version
            for _ in range(5):
                optimizer.step()
            self.assertEqual(param.grad._version, version)
            self.assertEqual(param.grad, value, rtol=0, atol=0)

    @optims(optim_db)
    def test_non_empty_state(self, device, dtype, optim_info):
        """Tools that ask whether an optimizer has state."""
        for given in every_path(optim_info, device, skip=("differentiable",)):
            model = torch.nn.Linear(5, 5, device=device, dtype=dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **given.kwargs)
            model(torch.rand(2, 5, device=device, dtype=dtype)).sum().backward()
            optimizer.step()
            self.assertEqual(len(optimizer.state), 2)
            for state in optimizer.state.values():
                self.assertEqual(set(state), {"exp_avg", "hessian"})

    @optims(optim_db, dtypes=[torch.float64])
    def test_differentiable(self, device, dtype, optim_info):
        """A gradient through the step that is not the step's: checked by finite differences.

        Without the clip, whose derivative is zero or none, and with a rate that is a function of the input.
        """
        for given in optim_info.optim_inputs_func(device=device):
            settings = {**given.kwargs, "gamma": 1e3, "eps": 1.0, "differentiable": True}
            lr = settings.pop("lr", 1e-3)

            def run(theta, gradient, scale, lr=lr, settings=settings):
                theta = theta.clone()
                theta.grad = torch.zeros_like(theta)  # torch warns where .grad is not a leaf's and is empty
                optimizer = optim_info.optim_cls([theta], lr=scale * lr, **settings)
                for power in (1, 2):
                    theta.grad = gradient**power
                    optimizer.step()
                return theta

            point = torch.rand(3, 4, device=device, dtype=dtype, requires_grad=True)
            gradient = torch.rand(3, 4, device=device, dtype=dtype, requires_grad=True)
            scale = torch.tensor(2.0, device=device, dtype=dtype, requires_grad=True)
            self.assertTrue(torch.autograd.gradcheck(run, (point, gradient, scale)), given.desc)


instantiate_device_type_tests(TestGenericSteps, globals())
