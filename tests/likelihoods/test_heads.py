"""Models with several outputs: one curvature, the weighted sum of the heads' own, against exact oracles."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaWarning
from sophia.curvature import GaussNewtonBartlett
from sophia.curvature.exact import gauss_newton_diagonal
from sophia.likelihoods import Bernoulli, Categorical, Gaussian, Heads, Likelihood
from tiny import ForcedLabels

CLASSES = 3
WEIGHT = 0.7


class TwoHeads(nn.Module):
    """Next token and value from one trunk; a value at every position."""

    def __init__(self, form="mapping"):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.tokens, self.value = nn.Embedding(4, 5), nn.Linear(5, CLASSES), nn.Linear(5, 1)
        self.form = form
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.9)

    def forward(self, x):
        hidden = torch.tanh(self.embedding(x).cumsum(1))
        logits, value = self.tokens(hidden), self.value(hidden).squeeze(-1)
        return {
            "mapping": lambda: {"logits": logits, "value": value},
            "object": lambda: SimpleNamespace(logits=logits, value=value),
            "tuple": lambda: (logits, value),
            "logits alone": lambda: {"logits": logits},
        }[self.form]()


def data():
    """Two sequences; three tokens count (padding is -1), and the values of the last positions."""
    x = torch.tensor([[0, 1, 3], [2, 2, 1]])
    y = torch.tensor([[1, 2, -1], [0, -1, -1]])
    valued = torch.tensor([[False, False, True], [False, True, True]])
    return x, y, valued, torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.3]])


def loss_of(output, y, valued, target):
    tokens = F.cross_entropy(output["logits"].flatten(0, 1), y.flatten(), ignore_index=-1)
    return tokens + WEIGHT * F.mse_loss(output["value"][valued], target[valued])


class ForcedNoise(Gaussian):
    """Labels at plus and minus one sigma, given in order: mean 0 and variance 1 like the normal's."""

    def __init__(self, signs):
        super().__init__()
        self.signs, self.used = signs, 0

    def sampled_gradient(self, outputs, mask, generator, *, scale=1.0):
        z = torch.zeros_like(outputs)
        n = int(mask.sum())
        z[mask] = self.signs[self.used : self.used + n]
        self.used += n
        return z * (-scale / self.sigma)


def exact(model, x, y, valued):
    """``G_tokens + WEIGHT * G_value``, flat."""

    def of(name):
        return lambda p: torch.func.functional_call(model, p, (x,))[name]

    parameters = dict(model.named_parameters())
    tokens = gauss_newton_diagonal(of("logits"), parameters, likelihood=Categorical(), mask=y >= 0)
    value = gauss_newton_diagonal(of("value"), parameters, likelihood=Gaussian(), mask=valued)
    return torch.cat([(tokens[name] + WEIGHT * value[name]).flatten() for name in parameters])


def estimate(opt, model):
    return torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()])


def heads(tokens=None, value=None):
    parts = {"logits": tokens or Categorical(), "value": value or Gaussian()}
    return Heads(parts, weights={"value": WEIGHT})


def sophia(model, likelihood=None, **settings):
    common = {"lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.0), "fraction": 1.0, "update_every": 1}
    return Sophia(model, likelihood=likelihood or heads(), **{**common, **settings})


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_all_labels_of_all_heads_give_the_exact_diagonal(double, micro_batches):
    """One count for both heads, a weight that is squared, or labels that are shared between the heads."""
    model, (x, y, valued, target) = TwoHeads(), data()
    probabilities = torch.softmax(model(x)["logits"][y >= 0], -1).detach()
    mean = 0.0
    labels = itertools.product(range(CLASSES), repeat=3)
    signs = list(itertools.product((-1.0, 1.0), repeat=3))
    for combination, noise in itertools.product(labels, signs):
        drawn = torch.tensor(combination)
        opt = sophia(model, heads(ForcedLabels(drawn), ForcedNoise(torch.tensor(noise))))
        for rows in torch.arange(2).chunk(micro_batches):
            output = model(x[rows])
            # Each micro-batch's share of the means over the whole batch.
            part = F.cross_entropy(
                output["logits"].flatten(0, 1), y[rows].flatten(), ignore_index=-1, reduction="sum"
            )
            value = (output["value"] - target[rows])[valued[rows]].square().sum()
            (part / 3 + WEIGHT * value / 3).backward()
        opt.step()
        opt.zero_grad()
        assert opt.stats()["B"] == 6
        mean = mean + probabilities[torch.arange(3), drawn].prod() / len(signs) * estimate(opt, model)
    torch.testing.assert_close(mean, exact(model, x, y, valued), rtol=1e-5, atol=1e-9)


def test_mean_of_the_real_samplers():
    """Noise that both heads share. One draw's sum has relative deviation below 1: 4,000 draws, 1.6%."""
    model, (x, y, valued, target) = TwoHeads(), data()
    opt, draws = sophia(model, seed=5), 4000
    total = 0.0
    for _ in range(draws):
        loss_of(model(x), y, valued, target).backward()
        opt.step()
        opt.zero_grad()
        total = total + estimate(opt, model)
    expected = exact(model, x, y, valued)
    assert abs(float(total.sum() / draws / expected.sum()) - 1) < 0.06
    # The same labels in both heads would leave cross terms in the trunk, of any sign.
    trunk = model.embedding.weight.numel()
    assert abs(float(total[:trunk].sum() / draws / expected[:trunk].sum()) - 1) < 0.08


@pytest.mark.parametrize("form", ["mapping", "object", "tuple"])
def test_outputs_are_found_by_name_or_by_function(form):
    """A head that is not found, or the wrong one."""
    model, (x, y, valued, target) = TwoHeads(form), data()
    settings = {"logits_fn": lambda out: {"logits": out[0], "value": out[1]}} if form == "tuple" else {}
    opt = sophia(model, **settings)
    output = model(x)
    named = {
        "mapping": lambda: output,
        "object": lambda: vars(output),
        "tuple": lambda: dict(zip(("logits", "value"), output, strict=True)),
    }[form]()
    loss_of(named, y, valued, target).backward()
    opt.step()
    assert opt.stats()["B"] == 6
    assert opt.stats()["refreshes"] == 1


@pytest.mark.parametrize("left_out", ["logits", "value"])
def test_a_head_that_the_loss_leaves_out_counts_nothing(left_out):
    """Training the heads in turns: the other one would be counted whole."""
    model, (x, y, valued, target) = TwoHeads(), data()
    opt, output = sophia(model), model(x)
    if left_out == "value":
        F.cross_entropy(output["logits"].flatten(0, 1), y.flatten(), ignore_index=-1).backward()
    else:
        F.mse_loss(output["value"][valued], target[valued]).backward()
    opt.step()
    assert opt.stats()["B"] == 3
    used, unused = (model.tokens, model.value) if left_out == "value" else (model.value, model.tokens)
    assert opt.state[used.weight]["hessian"].any()
    assert not opt.state[unused.weight]["hessian"].any()


def test_half_of_the_rows_of_all_heads():
    """Heads that are cut differently."""
    model, (x, y, valued, target) = TwoHeads(), data()
    opt = sophia(model, fraction=0.5)
    loss_of(model(x), y, valued, target).backward()
    opt.step()
    assert opt.stats()["B"] == int((y[:1] >= 0).sum() + valued[:1].sum())


def test_heads_of_other_shapes_are_taken_whole():
    """One value a batch cannot be cut where the tokens are."""

    class OneValue(TwoHeads):
        def forward(self, x):
            output = super().forward(x)
            return {"logits": output["logits"], "value": output["value"].mean()}

    model, (x, y, _, _) = OneValue(), data()
    opt, output = sophia(model, fraction=0.5), model(x)
    (
        F.cross_entropy(output["logits"].flatten(0, 1), y.flatten(), ignore_index=-1) + output["value"]
    ).backward()
    opt.step()
    assert opt.stats()["B"] == 4


def test_mask_fn_by_name():
    """A penalty on everything hides what counts; each head has its own mask."""
    model, (x, y, valued, target) = TwoHeads(), data()
    opt = sophia(model, mask_fn=lambda args, kwargs, output: {"logits": y >= 0, "value": valued})
    output = model(x)
    penalty = 1e-4 * (output["logits"].square().mean() + output["value"].square().mean())
    (loss_of(output, y, valued, target) + penalty).backward()
    opt.step()
    assert opt.stats()["B"] == 6


def test_logits_built_outside_of_the_loss_are_counted_by_their_labels():
    """A head whose logits are made anew by logits_fn gets no gradient, and is in the loss all the same."""

    class Fused(TwoHeads):
        def forward(self, x, labels):
            hidden = torch.tanh(self.embedding(x).cumsum(1))
            loss = F.cross_entropy(self.tokens(hidden).flatten(0, 1), labels.flatten(), ignore_index=-1)
            return {"loss": loss, "hidden": hidden, "value": self.value(hidden).squeeze(-1)}

    model, (x, y, valued, target) = Fused(), data()
    opt = sophia(model, logits_fn=lambda out: {"logits": model.tokens(out["hidden"]), "value": out["value"]})
    output = model(x, labels=y)
    (output["loss"] + WEIGHT * F.mse_loss(output["value"][valued], target[valued])).backward()
    opt.step()
    assert opt.stats()["B"] == 6


def test_a_head_of_which_nothing_is_known_is_said():
    """Neither a gradient nor labels: what counts is a guess."""
    model, (x, y, valued, target) = TwoHeads(), data()
    opt = sophia(model)
    output = model(x)
    cut = {name: tensor.detach().requires_grad_() for name, tensor in output.items()}
    loss_of(cut, y, valued, target).backward()
    with pytest.warns(SophiaWarning) as said:
        opt.step()
    texts = " ".join(str(warning.message) for warning in said)
    assert "no gradient reached the head 'logits'" in texts
    assert "no gradient reached the head 'value'" in texts


def test_resume_and_copies():
    """Streams of noise that are another's after a resume, or a copy without its heads."""
    model, (x, y, valued, target) = TwoHeads(), data()
    opt = sophia(model, seed=1)
    other_model = copy.deepcopy(model)
    other = sophia(other_model, seed=9)
    other.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (other_model, other)):
        loss_of(m(x), y, valued, target).backward()
        o.step()
    assert torch.equal(estimate(opt, model), estimate(other, other_model))
    assert repr(copy.deepcopy(opt).likelihood) == "Heads(logits=Categorical x 1, value=Gaussian x 0.7)"


ERRORS = [
    ("tuple", {}, r"cannot find the head 'logits' in the output of TwoHeads \(tuple\); pass logits"),
    ("logits alone", {}, r"cannot find the head 'value' in the output of TwoHeads \(dict\)"),
    ("tuple", {"logits_fn": lambda out: out}, r"logits_fn returned tuple, .* heads \['logits', 'value'\]"),
    (
        "mapping",
        {"mask_fn": lambda args, kwargs, out: {"logits": None}},
        r"mask_fn returned \['logits'\], but the likelihood has the heads",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "settings", "text"), ERRORS)
def test_heads_that_are_not_there_are_named(form, settings, text):
    """The wrong tensor in silence, or a KeyError."""
    model = TwoHeads(form)
    opt = sophia(model, **settings)
    with pytest.raises(RuntimeError, match=text):
        model(data()[0])
    assert opt.stats()["refreshes"] == 0


@pytest.mark.parametrize(
    ("parts", "weights", "text"),
    [
        ({}, None, "give each output a likelihood"),
        ({"a": Categorical()}, {"b": 1.0}, r"weights for \['b'\], but its outputs are \['a'\]"),
        ({"a": "categorical"}, None, "the likelihood of 'a' is 'categorical': give an object"),
        ({"a": Categorical()}, {"a": 0.0}, "the weight of 'a' is 0.0: expected a finite number above 0"),
        ({"a": Categorical()}, {"a": float("nan")}, "the weight of 'a' is nan"),
    ],
)
def test_bad_heads_are_refused(parts, weights, text):
    """Each message is read at least here."""
    with pytest.raises(ValueError, match=text):
        Heads(parts, weights=weights)


def test_by_hand_heads_are_refused():
    """Counts that are known at the end only would give each head the scale of the other."""
    opt = sophia(TwoHeads(), mode="manual")
    with pytest.raises(TypeError, match="Heads go with mode='replay'"), opt.hessian_pass():
        pass


# ---- one likelihood, for the recorder and for the estimator


def test_the_estimators_own_likelihood_is_the_optimizers():
    """What counts would be read by the one and sampled by the other: (B,) against (B, C)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    opt = Sophia(model, estimator=GaussNewtonBartlett(Bernoulli()), fraction=1.0)
    F.binary_cross_entropy_with_logits(model(torch.randn(5, 3)), torch.rand(5, 2).round()).backward()
    opt.step()
    assert opt.stats()["B"] == 10
    with pytest.raises(ValueError, match="samples from Categorical, but likelihood='gaussian'"):
        Sophia(nn.Linear(3, 2), estimator=GaussNewtonBartlett(), likelihood="gaussian")


# ---- a likelihood of one's own


class NormalWithScale(Likelihood):
    """Mean and log sigma in the last dimension; the loss is ((y - mean) / sigma)^2 / 2 + log sigma."""

    event_dims = 1

    def sampled_gradient(self, outputs, mask, generator, *, scale=1.0):
        z = torch.randn(mask.shape, generator=generator)
        sigma = outputs.detach()[..., 1].exp()
        return torch.stack([-z / sigma, 1 - z**2], -1) * (scale * mask)[..., None]

    def output_curvature(self, outputs):
        precision = (-2 * outputs[..., 1]).exp()
        return torch.diag_embed(torch.stack([precision, torch.full_like(precision, 2.0)], -1))


def test_a_likelihood_of_ones_own():
    """The interface for losses that are not in the table; here a noise that the model itself predicts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.randn(8)
    counted = torch.arange(8) < 6
    by_name = gauss_newton_diagonal(
        lambda p: torch.func.functional_call(model, p, (x,)),
        dict(model.named_parameters()),
        likelihood=NormalWithScale(),
        mask=counted,
    )
    expected = torch.cat([by_name[name].flatten() for name, _ in model.named_parameters()])
    opt, total, draws = sophia(model, NormalWithScale()), 0.0, 4000
    for _ in range(draws):
        mean, log_sigma = model(x)[counted].unbind(-1)
        (((y[counted] - mean) / log_sigma.exp()).square() / 2 + log_sigma).mean().backward()
        opt.step()
        opt.zero_grad()
        total = total + estimate(opt, model)
    assert opt.stats()["B"] == 6
    assert abs(float(total.sum() / draws / expected.sum()) - 1) < 0.08  # 5 standard errors


# ---- sigma


def test_sigma_may_be_a_function():
    """A learned or estimated noise that is read once, at the start."""
    model, x, y = nn.Linear(2, 1), torch.randn(6, 2), torch.randn(6, 1)
    sigma = torch.tensor(2.0, requires_grad=True)
    results = []
    for likelihood in (Gaussian(2.0), Gaussian(lambda: sigma), Gaussian(lambda: 2.0)):
        opt = sophia(model, likelihood)
        (F.mse_loss(model(x), y) / 8).backward()
        opt.step()
        results.append(estimate(opt, model))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    opt = sophia(model, Gaussian(lambda: sigma))
    with torch.no_grad():
        sigma.mul_(2)
    (F.mse_loss(model(x), y) / 32).backward()
    opt.step()
    torch.testing.assert_close(estimate(opt, model), results[0] / 4)


def test_sigma_cancels_for_the_mean_squared_error():
    """Labels drawn with the noise of the data would scale h by twice its variance; MSELoss knows no noise."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1, bias=False), torch.randn(50, 3)
    for noise in (0.1, 10.0):
        y = model(x).detach() + noise * torch.randn(50, 1)
        (hessian,) = torch.autograd.functional.hessian(
            lambda w, y=y: F.mse_loss(x @ w.T, y), (model.weight.detach(),)
        )[0]
        found = gauss_newton_diagonal(
            lambda p: torch.func.functional_call(model, p, (x,)),
            dict(model.named_parameters()),
            likelihood=Gaussian(),
        )
        torch.testing.assert_close(found["weight"][0], hessian.reshape(3, 3).diagonal())
