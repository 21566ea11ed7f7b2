"""The short way back through the last layer: the same gradients as the dense way, and taken only where the
logits are what a plain linear layer returned.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.curvature.last_layer import Readout, watched
from sophia.likelihoods.sampling import Contrast
from tiny import GPT, LabelsFromLogits, V, data, estimate_in_state, relative_error


def contrast(rows, n, classes):
    labels = torch.randint(0, classes, (n, 4))
    labels[0] = labels[0, 0]  # a row whose labels are all the same
    return Contrast(rows, labels, torch.randn(n, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("some", [True, False], ids=["some rows", "all rows"])
def test_gradients_equal_those_of_the_dense_way(dtype, bias, some):
    """Another h depending on how the model happens to be written."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 11, bias=bias).to(dtype)
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    rows = torch.tensor([0, 3, 4, 10]) if some else None
    sparse = contrast(rows, 4 if some else 12, 11)
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(Readout(layer, x).loss(sparse), wanted)
    outputs = layer(x)
    expected = torch.autograd.grad(outputs, wanted, sparse.dense(outputs))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, **tolerance)


class Softcapped(GPT):
    def forward(self, ids, targets=None):
        logits = super().forward(ids)[0].tanh() * 3
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def with_hook(model):
    model.head.register_forward_hook(lambda layer, inputs, outputs: outputs * 2)
    return model


def patched(model):
    forward = model.head.forward
    model.head.forward = lambda x: forward(x) * 2
    return model


def normed(model):
    nn.utils.parametrizations.weight_norm(model.head)
    return model


def in_place(model):
    model.compile(backend="eager")
    return model


HEADS = {
    "plain": (GPT, True),
    "untied": (lambda: GPT(tied=False), True),
    "compiled blocks": (
        lambda: (lambda m: [b.compile(backend="eager") for b in m.blocks] and m)(GPT()),
        True,
    ),
    "softcapped logits": (Softcapped, False),
    "hook on the head": (lambda: with_hook(GPT()), False),
    "patched head": (lambda: patched(GPT()), False),
    "parametrised head": (lambda: normed(GPT(tied=False)), False),
    "compiled": (lambda: torch.compile(GPT(), backend="eager"), False),
    "compiled in place": (lambda: in_place(GPT()), False),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
@pytest.mark.parametrize(("make", "short"), HEADS.values(), ids=HEADS)
def test_taken_only_where_it_is_the_same(monkeypatch, make, short):
    """Elsewhere x W^T is not the logits, or a hook would make a compiled model compile again; and either way
    h is that of the dense way.
    """
    taken = []
    loss = Readout.loss
    monkeypatch.setattr(Readout, "loss", lambda self, contrast: taken.append(1) or loss(self, contrast))
    x, y = data()

    def estimated(model):
        opt = Sophia(model, lr=0.0, weight_decay=0.0, likelihood=LabelsFromLogits())
        model(x, y)[1].backward()
        opt.step()
        found = estimate_in_state(opt)
        return {name: found[p] for name, p in model.named_parameters()}

    torch._dynamo.reset()
    found = estimated(make())
    assert bool(taken) is short
    monkeypatch.setattr("sophia.refresh.replay.watched", lambda model, classes: _nothing())
    torch._dynamo.reset()
    assert relative_error(found, estimated(make())) < 1e-5


class _nothing:
    def __enter__(self):
        return []

    def __exit__(self, *_):
        return None


def test_hooks_are_gone_afterwards_and_logits_are_not_kept():
    """A hook left behind would slow every forward; logits kept alive are the largest tensor there is."""
    model, (x, y) = GPT(), data()
    with pytest.raises(ZeroDivisionError), watched(model, {V}) as calls:
        logits = model(x, y)[0]
        assert calls[0][0] is logits
        raise ZeroDivisionError
    assert not model.head._forward_hooks
    assert not any(value is logits for value in vars(calls[0][1]).values())


def test_a_logit_that_is_not_finite_is_not_hidden():
    """Labels drawn from NaN are some labels, with finite gradients: h would take in a broken forward."""
    model, (x, y) = GPT(tied=False), data()
    opt = Sophia(model, lr=0.0)
    with torch.no_grad():
        model.head.weight[3] = float("inf")
    model(x, y)[1].backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        opt.step()
    assert opt.stats()["skipped"] == 1
