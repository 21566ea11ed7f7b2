"""When h is renewed, exact resume, and the guards: no path on which it is not Sophia and nothing is said."""

import io
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaWarning, advice
from tiny import GPT, Bare, data


def run(model, opt, steps, scheduler=None):
    """Train; return the steps (from 0) on which h changed."""
    changed = []
    for _ in range(steps):
        step = opt.param_groups[0]["step"]
        opt.zero_grad()
        model(*data(4))[1].backward()
        before = opt.stats()["refreshes"]
        opt.step()
        if scheduler is not None:
            scheduler.step()
        if opt.stats()["refreshes"] > before:
            changed.append(step)
    return changed


@pytest.mark.parametrize("every", [1, 3, 10])
def test_h_changes_on_steps_0_k_2k_and_no_other(every):
    """The phase of the paper: before the step, the first one included."""
    model = GPT(layers=1)
    opt = Sophia(model, update_every=every)
    assert run(model, opt, 11) == list(range(0, 11, every))


def test_h_is_an_average_over_refreshes_without_correction():
    """beta2 applied once a step, or a bias correction, would be another optimizer than the paper's."""
    model = GPT(layers=1)
    opt = Sophia(model, lr=0.0, weight_decay=0.0, update_every=1, betas=(0.9, 0.75), seed=1)
    parameter = model.head.weight
    expected = torch.zeros_like(parameter)
    single = Sophia(
        model.parameters(), model=model, lr=0.0, weight_decay=0.0, update_every=1, betas=(0.9, 0.0), seed=1
    )
    for _ in range(3):
        opt.zero_grad()
        model(*data(4))[1].backward()
        opt.step()
        single.step()
        expected = 0.75 * expected + 0.25 * single.state[parameter]["hessian"]
    torch.testing.assert_close(opt.state[parameter]["hessian"], expected)


def test_groups_may_have_intervals_of_their_own():
    """A group's update_every that is ignored."""
    model = GPT(layers=1)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    opt = Sophia(
        [{"params": matrices, "update_every": 2}, {"params": vectors, "update_every": 3}], model=model
    )
    run(model, opt, 7)
    assert [group["refreshes"] for group in opt.param_groups] == [4, 3]


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_resume_is_bit_equal_at_every_phase_of_k(cut):
    """Phase, label noise and averages must come back from the file; the seed of the constructor must not
    win.
    """

    def train(model, opt, start, stop):
        for step in range(start, stop):
            opt.zero_grad()
            model(*data(4, seed=step))[1].backward()
            opt.step()

    straight = GPT(layers=1)
    opt = Sophia(straight, update_every=3)
    train(straight, opt, 0, 8)

    model = GPT(layers=1)
    opt_before = Sophia(model, update_every=3)
    train(model, opt_before, 0, cut)
    file = io.BytesIO()
    torch.save((model.state_dict(), opt_before.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = GPT(layers=1)
    resumed.load_state_dict(weights)
    opt_after = Sophia(resumed, seed=77)
    with pytest.warns(SophiaWarning, match=r"brings its own settings.*update_every=3 \(not 10\)"):
        opt_after.load_state_dict(state)
    train(resumed, opt_after, cut, 8)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert all(torch.equal(opt.state[a][k], opt_after.state[b][k]) for k in ("exp_avg", "hessian"))


def test_seed_and_step_decide_the_labels():
    """Equal noise on every refresh would make the average of h an average of one draw."""

    def h(seed, step):
        model = GPT(layers=1)
        opt = Sophia(model, lr=0.0, seed=seed, update_every=1, betas=(0.9, 0.0))
        opt.param_groups[0]["step"] = opt.param_groups[1]["step"] = step
        model(*data(4))[1].backward()
        opt.step()
        return opt.state[model.head.weight]["hessian"]

    assert torch.equal(h(0, 5), h(0, 5))
    assert not torch.equal(h(0, 5), h(0, 6))
    assert not torch.equal(h(0, 5), h(1, 5))


SCHEDULERS = [
    ("lr 0 on the first step", lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 5)),
    (
        "sequence",
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
            ],
            milestones=[3],
        ),
    ),
    ("one cycle", lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=10)),
]


@pytest.mark.parametrize("make", [s[1] for s in SCHEDULERS], ids=[s[0] for s in SCHEDULERS])
def test_schedulers_do_not_disturb_the_refresh(make):
    """A first step with lr = 0 (warm-up) still renews h, and betas written by a scheduler are used."""
    model = GPT(layers=1)
    opt = Sophia(model, update_every=2)
    assert run(model, opt, 5, make(opt)) == [0, 2, 4]


# ---- guards ----


def test_parameters_without_a_module_are_refused():
    """The most common way to run something that is not Sophia."""
    with pytest.raises(ValueError, match=r"Sophia got parameters but no model, .*Sophia\(model, ...\)"):
        Sophia([p.detach().clone().requires_grad_() for p in GPT().parameters()])


def test_no_forward_since_the_last_step_is_an_error():
    """A wrapper attached instead of the module that is called."""

    class Lightning(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = GPT()

    module = Lightning()
    opt = Sophia(module)
    module.net(*data(4))[1].backward()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(
        RuntimeError,
        match=r"due at step 0, but the attached module Lightning ran no forward in training mode",
    ):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


class NoLogits(Bare):
    def forward(self, ids, form):
        logits = super().forward(ids)
        loss = logits.logsumexp(-1).mean()
        return {"none": {"loss": loss, "logits": None}, "scalar": (loss,), "integers": logits.argmax(-1)}[
            form
        ]


def test_an_output_without_logits_is_an_error():
    model = NoLogits()
    opt = Sophia(model)
    with pytest.raises(RuntimeError, match=r"cannot find logits in the output of NoLogits .*pass logits_fn="):
        model(data(4)[0], "integers")
    assert opt.stats()["refreshes"] == 0


@pytest.mark.parametrize("form", ["none", "scalar"])
def test_a_loss_without_predictions_is_an_error(form):
    """No softmax in its graph, and no cross-entropy of any layer: sampling from something else would be
    silent.
    """
    model = NoLogits()
    opt = Sophia(model)
    before = [p.clone() for p in model.parameters()]
    output = model(data(4)[0], form)
    (output["loss"] if form == "none" else output[0]).backward()
    with pytest.raises(
        RuntimeError, match=r"NoLogits returns its loss, one number, .*logits_fn=.*hutchinson"
    ):
        opt.step()
    assert opt.stats()["refreshes"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_that_does_not_own_the_parameters_is_refused():
    """Two models of equal shape, and the wrong one attached."""
    with pytest.raises(
        RuntimeError, match=r"11 of 11 optimizer parameters are not, or no longer, parameters of Linear"
    ):
        Sophia(
            nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(11))).parameters(),
            model=nn.Linear(2, 2),
        )


@pytest.mark.parametrize("hooked", [False, True], ids=["", "and hooked"])
def test_parameters_replaced_after_construction_are_noticed(hooked):
    """DeepSpeed ZeRO and flat-parameter wrappers replace them; ZeRO also has hooks on those of the model, of
    which the words would lead nowhere.
    """
    model = GPT(layers=1, tied=False)
    opt = Sophia(model)
    if hooked:
        model.tokens.weight.register_post_accumulate_grad_hook(lambda p: None)
    model(*data(4))[1].backward()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(
        RuntimeError,
        match=r"1 of \d+ optimizer parameters are not, or no longer, parameters of GPT; a wrapper \(",
    ):
        opt.step()


def test_inputs_overwritten_since_the_forward_are_noticed():
    """The replay would run on another batch than the loss did."""
    model, (x, y) = GPT(), data(4)
    opt = Sophia(model)
    buffer = x.clone()
    model(buffer, y)[1].backward()
    buffer.copy_(x.flip(0))
    with pytest.raises(
        RuntimeError,
        match=r"an input tensor was modified in place between forward and step.*copy_inputs=True",
    ):
        opt.step()


def test_a_forward_that_cannot_be_repeated_is_noticed():
    """Data-dependent models give other logits when they are run again."""

    class Shrinking(Bare):
        calls = itertools.count(1)  # an object, which is not put back as a number would be

        def forward(self, ids):
            return super().forward(ids[:, next(self.calls) :])

    model, (x, y) = Shrinking(), data(4)
    opt = Sophia(model, fraction=1.0)
    F.cross_entropy(model(x).flatten(0, 1), y[:, 1:].flatten()).backward()
    with pytest.raises(
        RuntimeError, match=r"replay gave logits of shape \(4, 13, 61\) but training gave \(4, 15, 61\)"
    ):
        opt.step()


def test_a_mask_of_the_wrong_shape_is_an_error():
    """It would broadcast."""
    model, (x, y) = GPT(), data(4)
    opt = Sophia(model, mask_fn=lambda args, kwargs, output: torch.ones(4, dtype=torch.bool))
    model(x, y)[1].backward()
    with pytest.raises(
        RuntimeError,
        match=r"mask_fn returned torch.bool of shape \(4,\), but the predictions have shape \(4, 16\)",
    ):
        opt.step()


def test_counting_everything_is_said():
    """Neither a gradient at the logits nor labels: B may be wrong."""
    model, (x, y) = Bare(), data(4)
    opt = Sophia(model)
    detached = model(x)
    leaf = detached.detach().requires_grad_()  # a wrapper that copies outputs cuts the gradient off
    F.cross_entropy(leaf.flatten(0, 1), y.flatten()).backward()
    with pytest.warns(
        SophiaWarning,
        match=r"no gradient reached the logits and no labels were found.*counting every position",
    ):
        opt.step()


def test_a_loss_that_is_no_cross_entropy_is_refused_at_the_step():
    """likelihood='categorical' on a regression samples classes that do not exist; the user's own backward is
    left alone.
    """
    model, (x, _) = Bare(), data(4)
    opt = Sophia(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"cross-entropy: over the classes it sums to [\d.]+ of"):
        opt.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_loss_that_changes_its_kind_later_ends_no_training():
    """An error a thousand steps into a run."""
    model, (x, y) = Bare(), data(4)
    opt = Sophia(model, update_every=1)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    opt.step()
    opt.zero_grad()
    model(x).square().mean().backward()
    with pytest.warns(SophiaWarning, match="instead of 0"):
        opt.step()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropies_raise_no_such_alarm(label_smoothing):
    """Warnings are errors in this suite."""
    model, (x, y) = Bare(), data(4)
    opt = Sophia(model)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=label_smoothing).backward()
    opt.step()


def broken_weights(model):
    with torch.no_grad():
        model.norm.bias[0] = float("nan")


def all_masked(model):
    model.masked = True


class Maskable(GPT):
    masked = False

    def forward(self, ids, targets):
        logits, loss = super().forward(ids, targets)
        return logits, logits.sum() * 0 if self.masked else loss


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(broken_weights, "not finite"), (all_masked, "no prediction was counted")],
    ids=["nan", "masked"],
)
def test_a_useless_pass_is_skipped_counted_and_said(spoil, reason):
    """One NaN in h would stay for ever."""
    model = Maskable(layers=1)
    opt = Sophia(model, lr=0.0, update_every=1)
    run(model, opt, 1)
    before = [opt.state[p]["hessian"].clone() for p in model.parameters()]
    spoil(model)
    with pytest.warns(SophiaWarning, match=rf"a Hessian pass was skipped at step 1: .*{reason}"):
        run(model, opt, 1)
    assert opt.stats()["skipped"] == 1
    assert opt.stats()["refreshes"] == 1
    assert all(
        torch.equal(a, opt.state[p]["hessian"]) for a, p in zip(before, model.parameters(), strict=True)
    )


def test_a_curvature_of_zero_everywhere_is_said():
    """Sampled logits that do not depend on the parameters: sign momentum for ever."""
    weight = nn.Parameter(torch.ones(3))
    opt = Sophia([weight], mode="manual")
    weight.grad = torch.ones(3)

    def refresh():
        with opt.hessian_pass() as hp:
            hp.sampled_loss(weight[None] * torch.zeros(1, 3)).backward()

    for _ in range(10):  # some draws are of equal labels, which give no gradient to begin with
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            refresh()
        if said:
            break
    assert "none in any parameter" in str(said[0].message)
    assert opt.stats()["skipped"] == 0  # zero is what it estimates: it is averaged


def test_parameters_that_the_logits_do_not_reach_are_said():
    """A value head beside the language model has no curvature here."""

    class WithValue(Bare):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.ones(()))

        def forward(self, ids):
            return super().forward(ids), self.value * 2

    model, (x, y) = WithValue(), data(4)
    opt = Sophia(model)
    logits, value = model(x)
    (F.cross_entropy(logits.flatten(0, 1), y.flatten()) + value).backward()
    with pytest.warns(
        SophiaWarning, match=r"1 of \d+ parameters have a training gradient but none in the Hessian pass"
    ):
        opt.step()


def test_a_stale_h_is_said_once_and_again_after_it_was_cured():
    """Manual mode without passes is sign momentum."""
    model = GPT(layers=1)
    opt = Sophia(model, mode="manual", update_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, opt, 5)
    with pytest.warns(
        SophiaWarning,
        match=r"never refreshed in 5 steps \(update_every=2\): h is all zero and step\(\) is sign momentum",
    ):
        run(model, opt, 1)
    run(model, opt, 1)
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(*data(4))[0]).backward()
    run(model, opt, 5)
    with pytest.warns(SophiaWarning, match=r"last refreshed 5 steps ago \(update_every=2\): h is stale"):
        run(model, opt, 1)


def test_an_optimizer_inside_the_backward_is_refused():
    """A post-accumulate hook would step on the sampled gradient."""
    model = GPT(layers=1)
    opt = Sophia(model)
    model(*data(4))[1].backward()
    model.head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match="post-accumulate-grad hook"):
        opt.step()


def test_two_models_are_refused():
    """One of them would be ignored."""
    with pytest.raises(ValueError, match="Sophia got two models"):
        Sophia(GPT(), model=GPT())


def test_a_model_without_trainable_parameters_is_refused():
    """Nothing would happen."""
    with pytest.raises(ValueError, match=r"Linear has no parameter with requires_grad=True"):
        Sophia(nn.Linear(2, 2).requires_grad_(False))


def test_stats_are_flat_numbers_from_the_first_moment():
    """Loggers call it before the first step."""
    model = GPT(layers=1)
    opt = Sophia(model)
    names = set(opt.stats())
    run(model, opt, 3)
    after = opt.stats()
    assert set(after) == names
    assert all(type(value) is float for value in after.values())
    assert after["age"] == 3
    assert 0 <= after["unclipped"] <= 1
    assert after["h_q05"] <= after["h_q50"] <= after["h_q95"]


def test_unclipped_is_the_share_below_the_curvature():
    """The number that users tune gamma by."""
    p = nn.Parameter(torch.zeros(4))
    opt = Sophia([p], mode="manual", gamma=0.5, eps=1e-3)
    p.grad = torch.ones(4)
    opt.step()
    opt.state[p]["exp_avg"].copy_(torch.tensor([0.1, 0.1, 0.1, 0.1]))
    opt.state[p]["hessian"].copy_(torch.tensor([1.0, 0.1, 1e-3, 0.0]))
    stats = opt.stats()
    assert (stats["unclipped"], stats["eps_limited"], stats["h_zero"]) == (0.25, 0.5, 0.25)


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson", "empirical_fisher"])
def test_gradients_that_another_optimizer_owns_are_left_alone(estimator):
    """Embeddings by AdamW beside Sophia: the sampled gradient must not be added to theirs."""
    model = GPT(layers=1)
    table = model.tokens.weight
    others = [p for p in model.parameters() if p is not table]
    opt = Sophia(others, model=model, estimator=estimator)
    model(*data(4))[1].backward()
    held, kept = table.grad, table.grad.clone()
    opt.step()
    assert opt.stats()["refreshes"] == 1
    assert table.grad is held
    assert torch.equal(table.grad, kept)


def test_own_rule_is_the_share_of_coordinates_that_the_published_rule_does_not_move():
    """By it advice knows when the range of the unclipped share says nothing."""
    weights = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(12))]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "rule": "damped", "scale": 1.0}]
    assert Sophia(groups, mode="manual").stats()["own_rule"] == 0.75
    assert Sophia(weights, mode="manual").stats()["own_rule"] == 0.0


ADVICE = [
    ({"refreshes": 0}, "never refreshed"),
    ({"skipped": 30}, "most Hessian passes were skipped"),
    ({"eps_limited": 0.7}, "eps decides most steps"),
    ({"eps_limited": 0.92, "h_zero": 0.92, "unclipped": 0.01}, "exactly 0 in 92% of the coordinates"),
    ({"eps_limited": 0.92, "h_zero": 0.92, "refreshes": 3.0}, "(3 so far); a larger fraction"),
    ({"eps_limited": 0.9, "h_zero": 0.2}, "eps decides most steps"),
    ({"unclipped": 0.8}, "lower gamma"),
    ({"unclipped": 0.01}, "raise gamma"),
    ({"unclipped": 0.01}, "rule='damped'"),
    ({"unclipped": 0.01, "own_rule": 1.0}, ""),
    ({"eps_limited": 0.9, "own_rule": 1.0}, ""),
    ({"refreshes": 0.0, "own_rule": 1.0}, "never refreshed"),
    ({}, ""),
]


@pytest.mark.parametrize(("changed", "text"), ADVICE)
def test_advice(changed, text):
    """Advice must follow the number that leaves its range."""
    healthy = {"refreshes": 10.0, "skipped": 0.0, "unclipped": 0.3, "eps_limited": 0.0, "age": 1.0}
    found = advice({**healthy, **changed})
    assert text in found
    assert bool(text) == bool(found)
