"""What only the plain path takes: mixed and half-precision dtypes, odd layouts, derivatives of the step."""

import numpy as np
import pytest
import torch

from reference import Reference, array, noise_like
from sophia.step.kernels import single_tensor
from sophia.step.rules import DAMPED, PAPER, SPECTRAL, StepSettings
from sophia.update_rule import sophia_step

SETTINGS = {"lr": 0.01, "beta1": 0.9, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.1}


def test_it_is_the_rule_bit_for_bit():
    """The path that the faster ones are held to drifting away from the printed equation."""
    theta, g, m, h = (torch.randn(50) for _ in range(4))
    new_theta, new_m = sophia_step(theta, g, m, h, **SETTINGS)
    single_tensor.step([theta], [g], [m], [h], StepSettings(PAPER, **SETTINGS))
    assert torch.equal(theta, new_theta)
    assert torch.equal(m, new_m)


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic_in_the_precision_of_the_state(dtype, state):
    """Half-precision parameters rounded more than once a step, or their m and h rounded at all."""
    p = torch.randn(400).to(dtype)
    m, h = torch.zeros(400, dtype=state), torch.rand(400, dtype=state) * 1e-2
    for step in range(5):
        reference = Reference([p], **SETTINGS)
        reference.ms, reference.hs = [array(m)], [array(h)]
        grad = noise_like([p], step)
        single_tensor.step([p], grad, [m], [h], StepSettings(PAPER, **SETTINGS))
        reference.step(grad)
        assert p.dtype == dtype
        assert m.dtype == state
        half_ulp = torch.finfo(dtype).eps * 0.51
        np.testing.assert_allclose(array(p), reference.thetas[0], rtol=half_ulp + 1e-6, atol=1e-7)
        wide = 1e-13 if state == torch.float64 else 3e-7
        np.testing.assert_allclose(array(m), reference.ms[0], rtol=wide, atol=wide)


def test_float16_at_zero_gradient_and_tiny_curvature():
    """An eps or an h of 1e-12 that underflows in float16 gives 0 / 0."""
    p, m, h = torch.ones(3, dtype=torch.float16), torch.zeros(3), torch.tensor([0.0, 1e-11, 1.0])
    single_tensor.step([p], [torch.zeros_like(p)], [m], [h], StepSettings(PAPER, **SETTINGS))
    assert p.isfinite().all()
    # m = 1e-4; gamma h = 0, 5e-13 and .05: only the last coordinate is not clipped
    settings = {**SETTINGS, "weight_decay": 0.0}
    before = p.float()
    single_tensor.step([p], [torch.full_like(p, 1e-3)], [m], [h], StepSettings(PAPER, **settings))
    np.testing.assert_allclose(before - p.float(), [0.01, 0.01, 0.01 * 1e-4 / 0.05], atol=6e-4)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_gradient_of_another_layout(layout):
    """Torch's fused AdamW on a CPU reads such a gradient in storage order: wrong coordinates, no error."""
    p, m, h = torch.randn(4, 6), torch.zeros(4, 6), torch.rand(4, 6)
    grad = {
        "transposed": torch.randn(6, 4).t(),
        "expanded": torch.randn(1, 6).expand(4, 6),
        "strided": torch.randn(8, 12)[::2, ::2],
    }[layout]
    expected, _ = sophia_step(p, grad.contiguous(), m, h, **SETTINGS)
    single_tensor.step([p], [grad], [m], [h], StepSettings(PAPER, **SETTINGS))
    assert torch.equal(p, expected)


def test_gradient_flows_through_a_step():
    """Meta-learning through the optimizer: the derivatives, by hand, of an unclipped and a clipped step."""
    start = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([2.0, 2.0], dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    theta, m = start.clone(), torch.zeros(2, dtype=torch.float64)
    h = torch.tensor([40.0, 1.0], dtype=torch.float64)  # m = 1; gamma h = 2 and .05
    settings = {"beta1": 0.5, "gamma": 0.05, "eps": 1e-12, "weight_decay": 0.2}
    single_tensor.step([theta], [grad], [m], [h], StepSettings(PAPER, lr=lr, **settings))
    theta.sum().backward()
    torch.testing.assert_close(start.grad, torch.full_like(start, 1 - 0.1 * 0.2))
    torch.testing.assert_close(grad.grad, torch.tensor([-0.1 * 0.5 / 2, 0.0], dtype=torch.float64))
    torch.testing.assert_close(lr.grad, torch.tensor(-2 * 0.2 - 0.5 - 1, dtype=torch.float64))


@pytest.mark.parametrize("rule", [PAPER, DAMPED, SPECTRAL], ids=lambda rule: rule.name)
def test_decay_with_a_rate_in_half_precision(rule):
    """A tensor lr in bfloat16, where 1 - lr wd is 1: weights that never decay."""
    theta = torch.ones(3, 4)
    zeros = torch.zeros_like(theta)
    lr = torch.tensor(1e-3, dtype=torch.bfloat16)
    given = StepSettings(rule, lr=lr, beta1=0.9, gamma=0.05, eps=1e-12, weight_decay=0.5, damping=0.5)
    sizes = [torch.zeros(())]
    h = zeros if rule.has_curvature else {}
    single_tensor.step([theta], [zeros], [zeros.clone()], [h], given, sizes=sizes)
    torch.testing.assert_close(theta, torch.full_like(theta, 1 - float(lr) * 0.5))
