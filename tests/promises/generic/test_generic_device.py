"""torch's generic tests that need a GPU: they are collected everywhere and skipped, with the reason, without.

None of them has been run by the authors of this file, who had no GPU.
"""

import gc
from copy import deepcopy
from unittest.mock import patch

import torch
from infos import every_path, optim_db
from torch.nn import Parameter
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCUDA
from torch.testing._internal.common_optimizers import optims
from torch.testing._internal.common_utils import TestCase

from sophia.step.kernels import foreach


class TestGenericDevice(TestCase):
    @onlyCUDA
    @optims(optim_db)
    def test_state_dict_cross_device(self, device, dtype, optim_info):
        """State of a CPU run that continues elsewhere on a GPU."""
        for given in every_path(optim_info, "cpu", skip=("differentiable", "fused")):
            params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
            optimizer = optim_info.optim_cls(params, **given.kwargs)
            copies = [Parameter(p.detach().to(device)) for p in params]
            other = optim_info.optim_cls(copies, **given.kwargs)

            def steps(n, pairs):
                for step in range(n):
                    for one, ps in pairs:
                        for i, p in enumerate(ps):
                            p.grad = torch.full_like(p, 0.1 * (step - i))
                        one.step()

            steps(3, [(optimizer, params)])
            with torch.no_grad():
                for p, q in zip(params, copies, strict=True):
                    q.copy_(p)
            before = deepcopy(optimizer.state_dict())
            other.load_state_dict(before)
            self.assertEqual(before, optimizer.state_dict())
            steps(5, [(optimizer, params), (other, copies)])
            self.assertEqual(params, [q.cpu() for q in copies])

    @onlyCUDA
    @optims(optim_db)
    def test_defaults_changed_to_foreach(self, device, dtype, optim_info):
        """A GPU that walks through the parameters one by one, unless told otherwise."""
        for given in optim_info.optim_inputs_func(device=device):
            if given.kwargs.get("state_dtype") == torch.float64:
                continue  # of another dtype than the parameter: tensor by tensor
            model = torch.nn.Linear(5, 5, device=device, dtype=dtype)
            optimizer = optim_info.optim_cls(model.parameters(), **given.kwargs)
            model(torch.rand(2, 5, device=device, dtype=dtype)).sum().backward()
            with patch.object(foreach, "step") as called:
                optimizer.step()
            self.assertTrue(called.called, given.desc)

    @onlyCUDA
    @optims(optim_db)
    def test_peak_memory_foreach(self, device, dtype, optim_info):
        """More than one copy of the parameters beside them: out of memory in the first step.

        Two with a tensor lr, or with maximize, whose negated gradients are a copy.
        """
        for given in optim_info.optim_inputs_func(device=device):
            peaks = []
            for value in (False, True):
                params = [torch.rand(16, 8, device=device, dtype=dtype) for _ in range(10)]
                optimizer = optim_info.optim_cls(params, **{**deepcopy(given.kwargs), "foreach": value})
                for p in params:
                    p.grad = torch.rand_like(p)
                optimizer.step()
                gc.collect()
                torch.cuda.reset_peak_memory_stats()
                optimizer.step()
                peaks.append(torch.cuda.max_memory_allocated())
            copies = 1 + given.kwargs.get("maximize", False) + ("capturable" in given.kwargs)
            # |m| is a second temporary for the time of one pass.
            self.assertLessEqual(peaks[1], peaks[0] + (copies + 1) * 10 * 512, given.desc)

    @onlyCUDA
    @optims(optim_db)
    def test_capturable_in_a_cuda_graph(self, device, dtype, optim_info):
        """A captured step that differs from the eager one, or that synchronises, which capturing refuses."""
        for given in optim_info.optim_inputs_func(device=device):
            results = []
            for captured in (False, True):
                torch.manual_seed(0)
                params = [Parameter(torch.randn(5, 3, device=device, dtype=dtype)) for _ in range(2)]
                for p in params:
                    p.grad = torch.randn_like(p)
                settings = {**deepcopy(given.kwargs), "capturable": True, "update_every": 1000}
                settings["lr"] = torch.tensor(float(settings.get("lr", 1e-3)), device=device)
                optimizer = optim_info.optim_cls(params, **settings)
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(3):
                        optimizer.step()
                torch.cuda.current_stream().wait_stream(side)
                if captured:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        optimizer.step()
                    for _ in range(4):
                        graph.replay()
                else:
                    for _ in range(4):
                        optimizer.step()
                results.append(params)
            self.assertEqual(*results)


instantiate_device_type_tests(TestGenericDevice, globals())
