"""The candidates and controls of the large-batch study do what their formulas say."""

from __future__ import annotations

import itertools
from typing import Any

import gauss_newton_solve
import pytest
import torch
from passes import Passes
from rotated_adam import RotatedAdam, Soap
from torch import Tensor, nn
from whitened_polar import STATISTICS, WhitenedPolar

from sophia import Sophia
from sophia.lab.config.run import Model
from sophia.lab.models import build
from sophia.step.hidden_matrices import hidden_matrices
from sophia.update_rule import along, eigenbasis, inverse_power, look_ahead, polar, rms

TINY = Model(layers=1, width=8, heads=2, context=6, vocabulary=11)


def tiny() -> Any:
    return build.build(TINY, seed=1)


def backward(model: Any, seed: int = 0) -> Tensor:
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    return ids


def candidate(model: nn.Module, **over: Any) -> WhitenedPolar:
    return WhitenedPolar(model, seed=3, **{**WhitenedPolar.sophia_defaults, **over})


def steps_of(model: Any, **over: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Gradient and step in units of lr of each hidden matrix, at the first step."""
    optimizer = candidate(model, lr=1.0, **over)
    backward(model)
    hidden = [p for p in model.parameters() if id(p) in hidden_matrices(model)]
    before = [p.detach().clone() for p in hidden]
    optimizer.step()
    return {i: (p.grad, b - p.detach()) for i, (p, b) in enumerate(zip(hidden, before, strict=True))}


def test_without_statistics_the_step_is_the_polar_factor_of_the_momentum() -> None:
    for g, step in steps_of(tiny().double(), statistics="none").values():
        m = 0.1 * g
        expected = polar(look_ahead(m, g, beta1=0.9))
        torch.testing.assert_close(step, 0.2 * expected / rms(expected), rtol=1e-6, atol=1e-9)


def test_the_factors_of_one_gradient_turn_its_singular_values_as_the_powers_say() -> None:
    """With L = G G' and R = G' G of this gradient alone, G = U s V': inside and outside 1/4, the polar factor
    is U V' and what leaves is U s^-1 V'. The oracle takes singular values, the code eigenvalues of L and R.
    """
    for g, step in steps_of(tiny().double(), statistics="gradients", average=0.0, damping=1e-6).values():
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        large = s > 0.05 * s.max()  # the damping is in the others
        found = (u.T @ step @ v.T).diagonal()[large] * s[large]
        # Newton-Schulz leaves singular values between 0.7 and 1.2.
        assert found.std() / found.mean() < 0.2


@pytest.mark.parametrize(
    ("statistics", "sides", "rest"),
    [
        *((each, "both", "adamw") for each in STATISTICS),
        ("gradients", "short", "rotated"),
        ("gradients", "mixed", "factored"),
    ],
)
def test_a_run_goes_on_from_its_state(statistics: str, sides: str, rest: str) -> None:
    """Else a comparison that was stopped would end elsewhere than one that was not."""
    settings = {"statistics": statistics, "sides": sides, "rest": rest, "every": 2, "outputs": 0.9}
    one, two = tiny(), tiny()
    whole = candidate(one, **settings)
    first = candidate(two, **settings)
    for number in range(6):
        if number == 3:
            state = first.state_dict()
            first = candidate(two, **settings)
            first.load_state_dict(state)
        for model, optimizer in ((one, whole), (two, first)):
            backward(model, seed=number)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("drawn", [False, True])
def test_moments_of_a_layer_are_those_of_its_inputs_and_output_gradients(drawn: bool) -> None:
    """Under drawn labels their mean over draws is that over all labels, each with its probability."""
    model = tiny().double()
    w = model.transformer.h[0].mlp.c_fc.weight
    passes = Passes(model, [w], seed=0, drawn=drawn)
    passes.watch()
    ids = backward(model)
    layer, kept = model.transformer.h[0].mlp.c_fc, []
    handle = layer.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    handle.remove()
    ((x, y),) = kept
    x = x.detach().flatten(0, 1)

    def output_moment(labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, labels)
        d = torch.autograd.grad(loss, y, retain_graph=True)[0].flatten(0, 1)
        return d.T @ d * len(d)

    if drawn:
        seen = torch.stack(
            [torch.stack([m for m in passes.moments(t)[id(w)] if len(m) == 32]) for t in range(400)]
        )
        p = logits.detach().softmax(-1)
        # E[d d'] over independent labels is the sum over predictions of what each label's own part gives.
        expected = torch.zeros(32, 32, dtype=torch.float64)
        parts = []
        for n, label in itertools.product(range(len(p)), range(11)):
            error = p.clone() * 0
            error[n] = p[n]
            error[n, label] -= 1
            d = torch.autograd.grad(logits, y, error / len(p), retain_graph=True)[0].flatten(0, 1)
            parts.append((p[n, label], d))
        for weight, d in parts:
            expected += weight * d.T @ d * 24
        found = seen.mean(0)[0].double()
        assert (found - expected).norm() / expected.norm() < 0.1
    else:
        a, s = passes.moments(0)[id(w)]
        torch.testing.assert_close(a.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(s.double(), output_moment(ids[:, 1:].flatten()), rtol=1e-4, atol=1e-9)


def test_inverse_power_against_singular_values() -> None:
    x = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    expected = u @ torch.diag((s**2 / (s**2).mean() + 0.1) ** -0.25) @ u.T
    basis = eigenbasis(x @ x.T)
    root = inverse_power(along(x @ x.T, basis), basis, power=0.25, damping=0.1)
    torch.testing.assert_close(root, expected)


def test_adam_in_a_basis_that_is_the_axes_is_adam() -> None:
    """Where L and R are diagonal their eigenvectors are axes, and the rotation must leave Adam as it is."""
    start, given = torch.zeros(3, 3), torch.diag(torch.tensor([3.0, -1.0, 0.5]))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95)}
    a = RotatedAdam([ours], **settings, average=0.5, every=2, sides="both")
    b = torch.optim.Adam([theirs], **settings)
    for factor in (1.0, -2.0, 0.5):
        for p, optimizer in ((ours, a), (theirs, b)):
            p.grad = factor * given
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "over"),
    [
        (Soap, {"polar": True}),
        (gauss_newton_solve.GaussNewton, {"iterations": 2}),
        (gauss_newton_solve.GaussNewton, {"iterations": 2, "block": "all", "length": "newton"}),
        (gauss_newton_solve.GaussNewton, {"iterations": 2, "rest": "factored", "warm": True}),
        (gauss_newton_solve.WholeModel, {"iterations": 2}),
    ],
)
def test_both_parts_of_a_candidate_move(make: Any, over: dict[str, Any]) -> None:
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make(model, seed=0, **{**make.sophia_defaults, **over})
    for number in range(2):  # some keep something for the next step
        optimizer.zero_grad()
        backward(model, seed=number)
        optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_products_with_the_gauss_newton_matrix_are_those_of_the_dense_one() -> None:
    model = tiny().double()
    name = "transformer.h.0.attn.c_attn.weight"
    w = dict(model.named_parameters())[name]
    ids = backward(model)
    products = gauss_newton_solve.BlockProducts(model, [name], [ids])
    model.set_attn_implementation("eager")

    def logits(value: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {name: value}, kwargs={"input_ids": ids})
        return out.logits[:, :-1].reshape(-1, 11)

    jacobian = torch.autograd.functional.jacobian(logits, w.detach()).flatten(2)
    p = logits(w.detach()).softmax(-1).detach()
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    dense = torch.einsum("nia,nij,njb->ab", jacobian, h, jacobian) / len(p)
    x = torch.randn(w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(products([x])[0].flatten(), dense @ x.flatten(), rtol=1e-10, atol=1e-12)
    mu = 0.1 * float(dense.diagonal().mean())
    (solved,) = gauss_newton_solve.conjugate_gradients(products, [x], mu=mu, iterations=200)
    exact = torch.linalg.solve(dense + mu * torch.eye(len(dense), dtype=torch.float64), x.flatten())
    torch.testing.assert_close(solved.flatten(), exact, rtol=1e-6, atol=1e-8)


def test_a_warm_solve_begins_at_the_best_multiple_of_the_last_one() -> None:
    """And goes on from there to the same end."""
    a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    u, last = [torch.tensor([5.0, 5.0], dtype=torch.float64)], [torch.tensor([1.0, 0.5], dtype=torch.float64)]

    def solved(iterations: int, first: list[Tensor]) -> Tensor:
        solve = gauss_newton_solve.conjugate_gradients
        return solve(lambda x: [a @ x[0]], u, mu=0.1, iterations=iterations, first=first)[0]

    def above(x: Tensor) -> float:
        return float(0.5 * x @ (a @ x + 0.1 * x) - u[0] @ x)

    begun = solved(0, last)
    assert all(above(begun) < above(begun * factor) for factor in (0.99, 1.01))
    torch.testing.assert_close(begun / begun[0], last[0] / last[0][0])
    torch.testing.assert_close(solved(2, last), torch.linalg.solve(a + 0.1 * torch.eye(2), u[0]))


def test_the_mixed_candidate_is_the_library_rule() -> None:
    """Else what was measured would not be what is shipped: the same steps for hidden matrices."""
    one, two = tiny().double(), tiny().double()
    study = candidate(
        one, lr=0.015, rest_lr=0.01, sides="mixed", inside=0.125, outside=0.125, beta1=0.8, every=1
    )
    # At every step, as the rule renews its eigenvalues then and the candidate with its eigenvectors alone.
    shipped = Sophia(two, lr=0.01, rule="whitened", weight_decay=0.0, update_every=1)
    hidden = hidden_matrices(two)
    for number in range(7):
        one.zero_grad()
        backward(one, seed=number)
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            q.grad = p.grad.clone()  # the rest of the model moves apart: AdamW here, factored there
        study.step()
        shipped.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        if id(q) in hidden:
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("wrong", [{"statistics": "h"}, {"sides": "long"}, {"rest": "sgd"}])
def test_what_there_is_not_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        candidate(tiny(), **wrong)
