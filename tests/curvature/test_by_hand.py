"""``with opt.hessian_pass()``: the refresh that the user writes."""

import pytest
import torch
from torch.nn import functional as F

from sophia import Sophia
from tiny import GPT, ForcedLabels, LabelsFromLogits, data, estimate_in_state, oracle, relative_error


@pytest.mark.parametrize("parts", [[slice(0, 16)], [slice(0, 3), slice(3, 16)]], ids=["1x16", "3+13"])
def test_equals_the_oracle_for_any_cut(parts):
    """B must be counted over all calls, and nothing divided twice."""
    model, (x, y) = GPT(), data(padded=True)
    expected, count = oracle(model, x, y >= 0)
    opt = Sophia(model, mode="manual", likelihood=LabelsFromLogits())
    model(x, y)[1].backward()
    before = [p.grad.clone() for p in model.parameters()]
    with opt.hessian_pass() as hp:
        for part in parts:
            hp.sampled_loss(model(x[part], y[part])[0], y[part] >= 0).backward()
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
    assert opt.stats()["B"] == count
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_needs_no_model():
    """Manual mode is for loops in which no module is called as a whole."""
    weight = torch.zeros(3, 2, requires_grad=True)
    opt = Sophia([weight], mode="manual")
    with opt.hessian_pass() as hp:
        hp.sampled_loss(torch.ones(4, 2) @ weight.T).backward()
    assert opt.stats()["B"] == 4
    assert (opt.state[weight]["hessian"] > 0).any()


def test_an_exception_inside_changes_nothing():
    """A pass that failed half-way must not leave half an estimate, or sampled gradients in ``.grad``."""
    model, (x, y) = GPT(), data(4)
    opt = Sophia(model, mode="manual")
    model(x, y)[1].backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), opt.hessian_pass() as hp:
        hp.sampled_loss(model(x, y)[0]).backward()
        raise ZeroDivisionError
    assert opt.stats()["refreshes"] == 0
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("estimator", ["hutchinson", "empirical_fisher"])
def test_other_estimators_take_the_loss(estimator):
    """By hand equals replay on the same batch."""
    x, y = data(4)
    states = []
    for mode in ("replay", "manual"):
        model = GPT(layers=1)
        opt = Sophia(model, mode=mode, estimator=estimator, fraction=1.0)
        model(x, y)[1].backward()
        if mode == "manual":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with opt.hessian_pass() as hp, sdpa_kernel(SDPBackend.MATH):
                hp.add(model(x, y)[1], y.numel())
        opt.step()
        states.append(torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]))
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-8)


MISUSE = [
    ("gnb", lambda hp, m, x, y: hp.add(m(x, y)[1], 4), TypeError, r"has no add\(\)"),
    ("hutchinson", lambda hp, m, x, y: hp.sampled_loss(m(x, y)[0]), TypeError, r"has no sampled_loss\(\)"),
    ("gnb", lambda hp, m, x, y: hp.sampled_loss(m(x, y)[0], y), ValueError, "mask is torch.int64 of shape"),
    ("gnb", lambda hp, m, x, y: hp.sampled_loss(m(x, y)[0], y[:2] >= 0), ValueError, r"of shape \(2, 16\)"),
    (
        "gnb",
        lambda hp, m, x, y: hp.sampled_loss(m(x, y)[0].detach()),
        ValueError,
        "logits do not require grad",
    ),
]


@pytest.mark.parametrize(("estimator", "call", "error", "text"), MISUSE)
def test_misuse_is_explained(estimator, call, error, text):
    """Each message is read at least here."""
    model, (x, y) = GPT(), data(4)
    opt = Sophia(model, mode="manual", estimator=estimator)
    with pytest.raises(error, match=text), opt.hessian_pass() as hp:
        call(hp, model, x, y)


def test_in_replay_mode_a_pass_by_hand_replaces_the_due_one():
    """Two refreshes on one step would move h twice."""
    model, (x, y) = GPT(), data(4)
    opt = Sophia(model)
    model(x, y)[1].backward()
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(x, y)[0]).backward()
    opt.step()
    assert opt.stats()["refreshes"] == 1


def test_sampled_loss_under_autocast_and_in_half_precision():
    """A float32 scalar over bfloat16 logits must back-propagate."""
    model, (x, y) = GPT(), data(8)
    expected, _ = oracle(model, x, y >= 0)
    opt = Sophia(model, mode="manual", likelihood=LabelsFromLogits())
    with opt.hessian_pass() as hp:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x, y)[0]
        hp.sampled_loss(logits).backward()
    # Labels are ranks of logits, so rounding changes a few of them: the scale must hold, not every entry.
    found = estimate_in_state(opt)
    ratio = sum(float(v.sum()) for v in found.values()) / sum(float(v.sum()) for v in expected.values())
    assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("pairs", [0, 1, 3])
@pytest.mark.parametrize("full", [True, False], ids=["all count", "some count"])
def test_closed_form_equals_cross_entropy_on_the_sampled_labels(pairs, full):
    """The closed form is the gradient of what it says it is."""
    logits = torch.randn(3, 5, 9, requires_grad=True)
    mask = torch.ones(3, 5, dtype=torch.bool) if full else torch.rand(3, 5) < 0.6
    labels = torch.randint(0, 9, (int(mask.sum()), *([2 * pairs] if pairs else [])))
    likelihood = ForcedLabels(labels)
    likelihood.pairs = pairs
    found = likelihood.sampled_gradient(logits, mask, torch.Generator(), scale=0.5)

    def loss(of):
        return F.cross_entropy(logits[mask], of, reduction="sum")

    total = loss(labels) if not pairs else sum((-1) ** j * loss(labels[:, j]) for j in range(2 * pairs))
    (expected,) = torch.autograd.grad(0.5 * total / max(2 * pairs, 1) ** 0.5, logits)
    torch.testing.assert_close(found, expected)
