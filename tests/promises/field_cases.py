"""Passes by hand, and exact Hessians, for losses that a replay cannot know."""

import copy

import torch
from curvature_cases import ONE_STEP, SIGMAS, SPREAD, differences, ratio

from oracle import double, gauss_newton
from sophia import Sophia
from sophia.curvature.exact import hessian_diagonal


def by_hand(model, passes, *, draws=400, **settings):
    """Mean of h over passes by hand, by name; ``passes(model, hp)`` is what stands inside the block."""
    opt = Sophia(model, mode="manual", **{**ONE_STEP, **settings})
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    squares = copy.deepcopy(sums)
    for _ in range(draws):
        for group in opt.param_groups:
            group["step"] += 1  # other noise
        with opt.hessian_pass() as hp:
            passes(model, hp)
        for name, p in model.named_parameters():
            sums[name] += opt.state[p]["hessian"]
            squares[name] += opt.state[p]["hessian"].double().square()
    means = {name: s / draws for name, s in sums.items()}
    errors = {n: ((s / draws - means[n].square()).clamp(min=0) / draws).sqrt() for n, s in squares.items()}
    return means, errors


def check_sampled_by_hand(
    make, data, outputs, loss, likelihood, *, draws=400, mask=None, split=lambda z: [z]
):
    """``hp.sampled_loss`` on the outputs of a loop is the exact Gauss-Newton diagonal of its loss."""
    torch.manual_seed(0)
    model = make()
    exact = gauss_newton(model, data, outputs, loss)

    def passes(model, hp):
        sum(hp.sampled_loss(part, mask) for part in split(outputs(model, data))).backward()

    found, _ = by_hand(model, passes, draws=draws, likelihood=likelihood)
    allowed = SIGMAS * SPREAD / draws**0.5
    wrong = {name: d for name, d in differences(found, exact).items() if not d < allowed}
    assert not wrong, f"trace {ratio(found, exact):.3g} of the exact one; {wrong}, {allowed:.2f} allowed"


def exact_hessian(model, data, loss):
    """Diagonal of the Hessian of ``loss(model, data)``, by name, in float64."""
    model, data = copy.deepcopy(model).double(), double(data)

    def of(parameters):
        return loss(lambda *inputs: torch.func.functional_call(model, parameters, inputs), data)

    return hessian_diagonal(of, dict(model.named_parameters()))


def check_hutchinson_by_hand(make, data, loss, *, count, draws=400):
    """``hp.add(loss, count)`` has the diagonal of the Hessian for its mean: within five of the standard
    errors that its own scatter says.
    """
    torch.manual_seed(0)
    model = make()
    exact = exact_hessian(model, data, loss)
    found, errors = by_hand(
        model, lambda model, hp: hp.add(loss(model, data), count), draws=draws, estimator="hutchinson"
    )
    size = max(float(e.abs().max()) for e in exact.values())
    for name, e in exact.items():
        off = (found[name] - e).abs() - 1e-4 * size
        assert bool((off <= 5 * errors[name]).all()), f"{name}: {found[name]} for {e}"
    assert size > 0
