"""The map over batch sizes: noise scale against its definition, the rates it tries, rules apart."""

from __future__ import annotations

import itertools
import math

import batch_map
import pytest
import torch
from batch_map import MICRO, MODEL, RULES, gradients, noise_scale, optimizer, rates
from torch import nn

from sophia.lab.models import build


def test_the_noise_scale_is_that_of_planted_gradients() -> None:
    """tr(Sigma) / |G|^2 in tokens: a scale in sequences, or in micro-batches, would be off by 64 or 1,024."""
    generator = torch.Generator().manual_seed(0)
    mean, spread, n, found = torch.full((400,), 0.5), 3.0, 32, []
    tokens = MICRO * MODEL.context
    for _ in range(200):
        noise = spread * torch.randn(n, 400, generator=generator) / math.sqrt(tokens)
        each = mean + noise
        squares = [float(g.square().sum()) for g in each]
        found.append(noise_scale(squares, float(each.mean(0).square().sum())))
    truth = 400 * spread**2 / float(mean.square().sum())
    assert sum(found) / len(found) == pytest.approx(truth, rel=0.05)


def test_a_gradient_that_is_lost_in_noise_has_no_scale() -> None:
    assert noise_scale([1.0, 1.0, 1.0, 1.0], 0.2) is None


@pytest.mark.parametrize("optimum", [0.013, 0.04, 0.0011])
def test_the_best_rate_has_a_worse_one_on_both_sides(optimum: float) -> None:
    ends: dict[float, float] = {}
    while (lr := next(rates(0.01, ends), None)) is not None:
        ends[lr] = math.log2(lr / optimum) ** 2
    best = min(ends, key=lambda lr: ends[lr])
    assert {best / 2, best * 2} <= set(ends)
    assert abs(math.log2(best / optimum)) <= 0.5


def test_micro_batches_sum_to_the_gradient_of_the_batch() -> None:
    model = build.build(MODEL, seed=1)
    model.set_attn_implementation("eager")
    ids = torch.randint(4096, (2 * MICRO, MODEL.context), generator=torch.Generator().manual_seed(0))
    squares, whole = gradients(model, ids)
    found = [p.grad.clone() for p in model.parameters()]
    alone = []
    for piece in ids.split(MICRO):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=piece, labels=piece).loss.backward()
        alone.append([p.grad.clone() for p in model.parameters()])
    expected = [sum(float(g.square().sum()) for g in piece) for piece in alone]
    assert squares == pytest.approx(expected, rel=1e-3)
    assert whole == pytest.approx(sum(float(g.square().sum()) for g in found), rel=1e-6)
    for both, *parts in zip(found, *alone, strict=True):
        torch.testing.assert_close(both, sum(parts) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name} {rule.gamma}")
def test_a_rule_moves_kinds_by_its_proportion(rule: batch_map.Rule) -> None:
    """With two rates the hidden matrices move by the smaller one; the first step of sign-like rules is lr."""
    model: nn.Module = build.build(MODEL, seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = optimizer(rule, model, 0.01)
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    ids = torch.randint(4096, (2, MODEL.context), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    opt.step()
    hidden = batch_map.hidden_names(model)
    moved = {
        kind: max(
            float((p.detach() - before[name]).abs().max())
            for name, p in model.named_parameters()
            if (name in hidden) is kind
        )
        for kind in (True, False)
    }
    for kind, scale in zip((True, False), rule.scales, strict=True):
        assert moved[kind] == pytest.approx(0.01 * scale, rel=1e-3)


def test_no_two_lines_have_one_key() -> None:
    for a, b in itertools.combinations(RULES, 2):
        assert (a.name, a.gamma) != (b.name, b.gamma)
