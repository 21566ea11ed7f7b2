"""Training in evaluation mode, on purpose (dropout off, BatchNorm's statistics fixed): a forward counts if a
backward came through it and through none in training mode. A validation, an attack, another network's step
do not.
"""

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from tiny import GPT, LabelsFromLogits, data, estimate_in_state, oracle, relative_error

EVERY = {"update_every": 1, "lr": 0.0, "weight_decay": 0.0, "fraction": 1.0}


def sophia(model, **settings):
    return Sophia(model, **{**EVERY, "likelihood": LabelsFromLogits(), **settings})


@pytest.mark.parametrize("given", [True, False], ids=["model", "parameters"])
@pytest.mark.parametrize("parts", [1, 4])
def test_h_is_that_of_the_function_trained(parts, given):
    """Refused; or replayed with dropout."""
    model, (x, y) = GPT(dropout=0.5).eval(), data(padded=True)
    weights = None
    expected, count = oracle(model, x, y >= 0, weights=weights)
    opt = sophia(model if given else model.parameters())
    total = (y >= 0).sum()
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        loss = F.cross_entropy(model(xs)[0].flatten(0, 1), ys.flatten(), ignore_index=-1, reduction="sum")
        (loss / total).backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
    assert not model.training


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x):
        return self.net(x)


def rows(n=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=g), torch.randint(0, 5, (n,), generator=g)


def test_what_was_proved_in_one_mode_is_not_taken_for_the_other():
    """With fixed statistics the rows are independent, in training they are not; the mode at the step is not
    that of the forward.
    """
    model, (x, y) = Normed(), rows()
    opt = Sophia(model, update_every=1, lr=0.0, fraction=1 / 8)
    seen = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for training in (False, True, False):
            model.train(training)
            before = [b.clone() for b in model.buffers()]
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            model.train()
            opt.step()
            seen.append(opt.stats()["B"])
            assert all(map(torch.equal, before, model.buffers())) is not training
    assert seen == [2, 16, 2]
    assert len(said) == 1
    assert "rows" in str(said[0].message)


def test_a_validation_does_not_count():
    """Without no_grad(), before, between and after, a hundred times: kept, warned of, or counted."""
    model, (x, y) = GPT(), data(padded=True)
    expected, count = oracle(model, x, y >= 0)
    opt = sophia(model)

    def validate():
        model.eval()
        for _ in range(100):
            model(x[:2], y[:2])
        model.train()

    validate()
    assert len(opt._recorder.recordings) <= 1
    loss = model(x, y)[1]
    validate()
    loss.backward()
    validate()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def test_the_graph_of_a_validation_is_not_kept():
    """The memory of a validation, held until the step."""
    model, (x, _) = GPT(), data()
    opt = sophia(model)
    logits = model.eval()(x)[0]
    (recording,) = opt._recorder.recordings
    assert recording.graph() is not None
    del logits
    gc.collect()
    assert recording.graph() is None


def test_nothing_but_a_validation_is_an_error():
    """An h of data that is not trained on."""
    model, (x, y) = GPT().eval(), data()
    opt = sophia(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model(x, y)
    with pytest.raises(RuntimeError, match="no backward came through one in evaluation mode"):
        opt.step()


def test_training_mode_goes_before():
    """An attack in evaluation mode, whose gradients in the parameters nobody clears."""
    model, (x, y) = GPT(), data(padded=True)
    expected, count = oracle(model, x, y >= 0)
    opt = sophia(model)
    model.eval()
    model(x.flip(0), y.flip(0))[1].backward()
    model.zero_grad()
    model.train()
    model(x, y)[1].backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


# ---- backwards that end elsewhere ----


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x):
        return self.net(x)


def attacked(model, x, y, how):
    """The direction in which the loss grows, in the inputs."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), y)
    if how == "grad":
        return torch.autograd.grad(loss, x)[0].sign()
    if how == "inputs":
        loss.backward(inputs=[x])
    else:
        loss.backward()
        model.zero_grad()
    return x.grad.sign()


@pytest.mark.parametrize("how", ["grad", "inputs", "cleared"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "training, evaluation"])
def test_an_attack_does_not_count(mode, how):
    """Adversarial training: the forwards that looked for the attack made half of h."""
    first, second = (*mode.split(", "), mode)[:2]
    hs = []
    for by_hand in (False, True):
        model, (x, y) = Embedded(), rows()
        direction = attacked(model, x, y, how)
        model.zero_grad()
        opt = Sophia(model, **EVERY)
        if not by_hand:
            model.train(first == "training")
            assert torch.equal(attacked(model, x, y, how), direction)
        model.train(second == "training")
        F.cross_entropy(model(x + 0.1 * direction), y).backward()
        opt.step()
        assert opt.stats()["B"] == 16
        hs.append(torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]))
    # The noise of a pass goes by the number of the forward, which is the first in both.
    assert torch.equal(*hs)


@pytest.mark.parametrize("how", ["grad", "some", "inputs"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_that_are_handed_out_count(training, how):
    """A loop that takes gradients by ``torch.autograd.grad`` and puts them into ``.grad`` itself."""
    model, (x, y) = Embedded().train(training), rows()
    opt = Sophia(model, **EVERY)
    parameters = list(model.parameters())[2:] if how == "some" else list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    if how == "inputs":
        loss.backward(inputs=parameters)
    else:
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = g
    opt.step()
    assert opt.stats()["B"] == 16


def test_a_discriminator_in_evaluation_mode_inside_its_generators_step():
    """The generator's loss, taken for one of the discriminator's."""
    torch.manual_seed(0)
    g, d = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))
    opt_d = Sophia(d, likelihood="bernoulli", **EVERY)
    opt_g = torch.optim.SGD(g.parameters(), 0.1)
    for _ in range(3):
        opt_g.zero_grad()
        d.eval()
        F.binary_cross_entropy_with_logits(d(g(torch.randn(5, 3))), torch.ones(5, 1)).backward()
        opt_g.step()
        d.train()
        opt_d.zero_grad()
        for x, label in ((torch.randn(8, 4), 1.0), (g(torch.randn(8, 3)).detach(), 0.0)):
            F.binary_cross_entropy_with_logits(d(x), torch.full((8, 1), label)).backward()
        opt_d.step()
        assert opt_d.stats()["B"] == 16


# ---- outputs that are others in evaluation ----


class Detector(nn.Module):
    """Logits in training; in evaluation what is found, as torchvision's detectors."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 5)

    def forward(self, x):
        logits = self.net(x)
        if self.training:
            return {"logits": logits}
        return [{"label": row.argmax(), "score": row.max()} for row in logits]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, RuntimeError, "Detector returns its loss"),
        ({"logits_fn": lambda output: output["logits"]}, TypeError, "indices"),
    ],
    ids=["found", "logits_fn"],
)
def test_outputs_of_another_kind_matter_only_if_they_are_trained(settings, error, words):
    """An error in the middle of a validation; none where nothing can be made of what is trained."""
    model, (x, y) = Detector(), rows()
    opt = Sophia(model, **EVERY, **settings)
    model.eval()(x)
    F.cross_entropy(model.train()(x)["logits"], y).backward()
    opt.step()
    opt.zero_grad()
    sum(found["score"] for found in model.eval()(x)).backward()
    with pytest.raises(error, match=words):
        opt.step()


def test_a_compiled_graph_with_the_loss_inside():
    """No gradient reaches the logits there: that of the loss says that the forward was trained."""
    torch._dynamo.reset()
    model, (x, y) = GPT().eval(), data(padded=True)
    expected, count = oracle(model, x, y >= 0)
    compiled = torch.compile(model, backend="aot_eager")
    opt = sophia(compiled)
    compiled(x, y)[1].backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
