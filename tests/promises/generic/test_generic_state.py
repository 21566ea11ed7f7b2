"""torch's generic tests of state: round trips, names, older files, copies, hooks."""

import pickle
import tempfile
from copy import deepcopy

import torch
from infos import every_path, inputs_that_round, optim_db
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optims
from torch.testing._internal.common_utils import TestCase, parametrize


def parameters(device, dtype):
    return [
        Parameter(torch.randn(2, 3, device=device, dtype=dtype)),
        Parameter(torch.randn(2, device=device)),
    ]


def named(params, names):
    return [(f"name{i}", p) for i, p in enumerate(params)] if names else params


def train(optimizer, params, steps):
    """Steps on a loss that depends on nothing but the parameters."""
    for _ in range(steps):
        optimizer.zero_grad()
        (params[0].sum(1) + params[1]).pow(2).sum().backward()
        optimizer.step()


def without_names(state):
    state = deepcopy(state)
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


class TestGenericState(TestCase):
    def inputs(self, optim_info, device):
        return every_path(optim_info, device, skip=("differentiable",), more=inputs_that_round())

    @optims(optim_db)
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        """The first thing a user does with it."""
        for given in every_path(optim_info, device):
            self.assertIn("gamma", repr(optim_info.optim_cls(parameters(device, dtype), **given.kwargs)))

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(optim_db)
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        """A fresh optimizer with loaded state that goes another way than the first."""
        for given in self.inputs(optim_info, device):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(named(params, is_named_optim0), **given.kwargs)
            train(optimizer, params, 10)
            copies = [Parameter(p.detach().clone()) for p in params]
            other = optim_info.optim_cls(named(copies, is_named_optim1), **given.kwargs)
            other.load_state_dict(deepcopy(optimizer.state_dict()))
            for _ in range(10):
                train(optimizer, params, 1)
                train(other, copies, 1)
                self.assertEqual(params, copies, rtol=0, atol=0)
            self.assertEqual(without_names(optimizer.state_dict()), without_names(other.state_dict()))
            # The same parameters twice have one representation.
            other.param_groups.extend(other.param_groups)
            self.assertEqual(
                without_names(optimizer.state_dict())["param_groups"][-1],
                without_names(other.state_dict())["param_groups"][-1],
            )

    @optims(optim_db)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        """A file of a version that lacked a setting."""
        for given in self.inputs(optim_info, device):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(params, **given.kwargs)
            train(optimizer, params, 3)
            old = deepcopy(optimizer.state_dict())
            for group in old["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    del group[flag]
            optimizer.load_state_dict(old)
            train(optimizer, params, 1)
            for flag in optim_info.not_og_supported_flags:
                self.assertEqual(optimizer.param_groups[0][flag], optimizer.defaults[flag])

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @optims(optim_db)
    def test_can_load_from_to_named_state_dict(
        self, device, dtype, optim_info, is_named_optim0, is_named_optim1
    ):
        """Checkpoints from before and after a user named the parameters."""
        for given in self.inputs(optim_info, device):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(named(params, is_named_optim0), **given.kwargs)
            train(optimizer, params, 3)
            other = optim_info.optim_cls(named(params, is_named_optim1), **given.kwargs)
            other.load_state_dict(deepcopy(optimizer.state_dict()))
            train(other, params, 1)
            names = other.state_dict()["param_groups"][0].get("param_names")
            expected = ["name0", "name1"] if is_named_optim0 or is_named_optim1 else None
            self.assertEqual(names, expected)

    @parametrize("is_named_optim", [True, False])
    @optims(optim_db)
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        """State that torch.load refuses, or changes, with the safe loader."""
        for given in self.inputs(optim_info, device):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(named(params, is_named_optim), **given.kwargs)
            train(optimizer, params, 3)
            with tempfile.TemporaryFile() as file:
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                self.assertEqual(torch.load(file, weights_only=True), optimizer.state_dict())

    @optims(optim_db)
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        """A copy, or an unpickled one, that lacks a setting."""

        def public(optimizer):
            return {name for name in vars(optimizer) if not name.startswith("_")}

        for given in self.inputs(optim_info, device):
            params = parameters(device, dtype)
            optimizer = optim_info.optim_cls(params, **given.kwargs)
            train(optimizer, params, 3)
            for copy in (deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                self.assertEqual(public(copy), public(optimizer))
                self.assertEqual(copy.state_dict(), optimizer.state_dict())

    @parametrize("hooks", ["pre", "post", "pre and post"])
    @optims(optim_db)
    def test_state_dict_hooks(self, device, dtype, optim_info, hooks):
        """Checkpoint tools that put things in and take them out."""

        def before(optimizer):
            optimizer.state["test"] = 1

        def after(optimizer, state):
            return {**state, "seen": state["state"].pop("test", None)}

        for given in self.inputs(optim_info, device):
            optimizer = optim_info.optim_cls(parameters(device, dtype), **given.kwargs)
            if "pre" in hooks:
                optimizer.register_state_dict_pre_hook(before)
            if "post" in hooks:
                optimizer.register_state_dict_post_hook(after)
            state = optimizer.state_dict()
            self.assertEqual(state["state"].get("test"), 1 if hooks == "pre" else None)
            self.assertEqual(state.get("seen"), 1 if hooks == "pre and post" else None)

    @optims(optim_db)
    def test_load_state_dict_hooks_and_prepend(self, device, dtype, optim_info):
        """Hooks that rewrite what is loaded, in their order, and that see the result."""

        def in_place(optimizer, state):
            state["param_groups"][0]["lr"] = 0.002

        def by_copy(optimizer, state):
            state = deepcopy(state)
            state["param_groups"][0]["lr"] = 0.003
            return state

        for given in self.inputs(optim_info, device):
            seen = []
            optimizer = optim_info.optim_cls(parameters(device, dtype), **given.kwargs)
            state = optimizer.state_dict()
            optimizer.register_load_state_dict_pre_hook(in_place)
            optimizer.register_load_state_dict_post_hook(
                lambda optimizer, seen=seen: seen.append(optimizer.param_groups[0]["lr"])
            )
            optimizer.load_state_dict(state)
            first = optimizer.register_load_state_dict_pre_hook(by_copy, prepend=True)
            optimizer.load_state_dict(state)
            first.remove()
            optimizer.register_load_state_dict_pre_hook(by_copy)
            optimizer.load_state_dict(state)
            self.assertEqual(seen, [0.002, 0.002, 0.003])

    @optims(optim_db)
    def test_step_all_hooks(self, device, dtype, optim_info):
        """Profilers and averaging: each hook once a step, in torch's order, and gone when removed."""
        params = parameters(device, dtype)
        for given in self.inputs(optim_info, device):
            order = []
            optimizer, other = optim_info.optim_cls(params, **given.kwargs), SGD(params)
            handles = [
                register_optimizer_step_pre_hook(lambda *_, order=order: order.append("global pre")),
                register_optimizer_step_post_hook(lambda *_, order=order: order.append("global post")),
            ]
            for one in (optimizer, other):
                handles.append(one.register_step_pre_hook(lambda *_, order=order: order.append("pre")))
                handles.append(one.register_step_post_hook(lambda *_, order=order: order.append("post")))
            try:
                for one in (optimizer, other, optimizer):
                    one.step()
            finally:
                for handle in handles:
                    handle.remove()
            self.assertEqual(order, ["global pre", "pre", "post", "global post"] * 3)
            optimizer.step()
            self.assertEqual(len(order), 12)


instantiate_device_type_tests(TestGenericState, globals())
