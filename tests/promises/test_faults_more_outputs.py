"""Several outputs in other forms: cut rows, uneven chunks, compiled models, half precision, views, states."""

import pytest
import torch
from curvature_cases import (
    Case,
    Words,
    check_curvature,
    check_told,
    cross_entropy,
    judged,
    mean_estimate,
    outcome,
    rows,
    sentences,
)
from test_faults_outputs import (
    Chunks,
    Trunk,
    Views,
    as_dict,
    both,
    of_chunks,
    two_heads,
    with_regression,
    with_value,
)
from torch import nn
from torch.nn import functional as F

from said import said
from sophia import Sophia
from sophia.likelihoods import Categorical, Gaussian, Heads
from sophia.refresh.graph_search import kin_of


def uneven():
    """Two micro-batches of three chunks and of two."""
    return sentences((6, 4, 2)), sentences((2, 2, 1), time=3)


def of_uneven(z, data):
    return (of_chunks(z[0], data[0]) + of_chunks(z[1], data[1])) / 2


def forwards(model, data):
    return [model(ids) for ids, _ in data]


class More(Trunk):
    """Everything that a model may return beside its logits."""

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        z = self.first(hidden)
        losses = F.cross_entropy(z, z.argmax(-1).detach(), reduction="none")
        return {"hidden": hidden, "logits": z, "probabilities": z.softmax(-1), "losses": losses}


class Exits(Trunk):
    """A head on the hidden states, and one on those of the layer after."""

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return [self.first(hidden), self.second(torch.tanh(hidden))]


def of_exits(z, data):
    return 0.3 * F.cross_entropy(z[0], data[1]) + F.cross_entropy(z[1], data[1])


class ViewsUnnamed(Views):
    def forward(self, x):
        return tuple(super().forward(x).values())


def of_unnamed_views(z, data):
    y = torch.arange(len(data[0]))
    return (F.cross_entropy(z[0], y) + F.cross_entropy(z[1], y)) / 2


class Flattened(Words):
    """Logits, the same logits in another form, and the last of every row."""

    def forward(self, ids):
        z = super().forward(ids)
        return z, z.reshape(-1, 7), z[:, -1]


def of_flattened(z, data):
    return F.cross_entropy(z[1], data[1].flatten()) + 0.7 * F.cross_entropy(z[2], data[1][:, 0])


def both_binary(z, data):
    y = F.one_hot(data[1], 5).to(z["aux"].dtype)
    losses = [F.binary_cross_entropy_with_logits(z[name], y) for name in ("logits", "aux")]
    return losses[0] + 0.4 * losses[1]


def in_half(dtype):
    def loop(model, opt, data, case):
        scaler = vars(opt).setdefault("scaler", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        with torch.autocast("cpu", dtype=dtype):
            loss = both(model(data[0]), data)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()

    return loop


QUARTER, HALF = {"fraction": 0.25}, {"fraction": 0.5}
CASES = {
    "chunks-cut": Case(Chunks, sentences, of_chunks, settings=HALF, draws=500, spread=2.0),
    "heads-cut": Case(two_heads(as_dict), rows, both, settings=QUARTER, draws=500, spread=2.0),
    "uneven-chunks": Case(Chunks, uneven, of_uneven, outputs=forwards),
    "uneven-chunks-half": Case(
        Chunks, uneven, of_uneven, outputs=forwards, settings=HALF, draws=500, spread=2.0
    ),
    "hidden-states-and-losses-too": Case(
        lambda: More(None), rows, lambda z, data: F.cross_entropy(z["logits"], data[1])
    ),
    "exits": Case(lambda: Exits(None), rows, of_exits),
    "exits-last-alone": Case(lambda: Exits(None), rows, lambda z, data: F.cross_entropy(z[1], data[1])),
    "views-without-heads": Case(ViewsUnnamed, lambda: rows(8), of_unnamed_views),
    "flattened-and-last": Case(Flattened, lambda: sentences((6, 6, 6, 6)), of_flattened),
    "binary": Case(two_heads(as_dict), rows, both_binary, settings={"likelihood": "bernoulli"}),
    "heads-of-two-kinds": Case(
        two_heads(with_value, 1),
        rows,
        with_regression,
        settings={
            "likelihood": Heads({"logits": Categorical(), "value": Gaussian()}, weights={"value": 0.4})
        },
    ),
    "bfloat16": Case(two_heads(as_dict), rows, both, loop=in_half(torch.bfloat16), slack=0.05),
    "float16": Case(two_heads(as_dict), rows, both, loop=in_half(torch.float16), slack=0.03),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_in_other_forms_count(case):
    """A form of several outputs that was not thought of."""
    check_curvature(case)


def test_outputs_of_a_compiled_model_count():
    """Outputs of one compiled graph, between which nothing can be seen."""

    class Compiled(Trunk):
        def __init__(self):
            super().__init__(None)
            self.compile(backend="aot_eager")

        def forward(self, x):
            hidden = torch.tanh(self.trunk(x))
            return {"hidden": hidden, "logits": self.first(hidden), "aux": self.second(hidden)}

    def of_two(z, data):
        return F.cross_entropy(z["logits"], data[1]) + 0.4 * F.cross_entropy(z["aux"], data[1])

    exact = Case(two_heads(as_dict), rows, both).exact()
    judged(case := Case(Compiled, rows, of_two), exact, *mean_estimate(case))


def feature_matching(z, data):
    return F.cross_entropy(z["logits"], data[1]) + z["aux"].square().mean()


def squeezed(a, b):
    return a, b[:, 0]


def of_squeezed(z, data):
    return F.cross_entropy(z[0], data[1]) + F.mse_loss(z[1], data[0][:, 0])


def of_two_numbers(z, data):
    return F.mse_loss(z["logits"][:, :4], data[0]) + F.mse_loss(z["value"], data[0][:, :1])


def binary_and_value(z, data):
    y = F.one_hot(data[1], 5).to(z["value"].dtype)
    return F.binary_cross_entropy_with_logits(z["logits"], y) + F.mse_loss(z["value"], data[0][:, :1])


TOLD = {
    "squares-of-features": (
        Case(two_heads(as_dict), rows, feature_matching),
        r'output\[\'aux\'\] of shape \(13, 5\).*Heads\(\{"logits": Categorical\(\), "aux": Gaussian\(\)\}\)',
    ),
    "value-of-one-dimension": (
        Case(two_heads(squeezed, 1), rows, of_squeezed),
        r'logits_fn=lambda output: \{"output_0": output\[0\], "output_1": output\[1\]\}',
    ),
    "two-regressions": (
        Case(two_heads(with_value, 1), rows, of_two_numbers, settings={"likelihood": "gaussian"}),
        r'Heads\(\{"logits": Gaussian\(\), "value": Gaussian\(\)\}\)',
    ),
    "binary-and-a-value": (
        Case(two_heads(with_value, 1), rows, binary_and_value, settings={"likelihood": "bernoulli"}),
        r'Heads\(\{"logits": Bernoulli\(\), "value": Gaussian\(\)\}\)',
    ),
}


@pytest.mark.parametrize(("case", "words"), TOLD.values(), ids=TOLD)
def test_outputs_of_another_kind_are_refused(case, words):
    """A part of the loss that h leaves out, without a word."""
    check_told(case, words, kind="error")


@pytest.mark.parametrize(
    "settings", [{"logits_fn": lambda z: z["logits"]}, {"likelihood": Heads({"logits": Categorical()})}]
)
def test_outputs_outside_of_those_given_are_named_once(settings):
    """What the user has not named is in his loss, and not in h."""
    case = Case(two_heads(with_value, 1), rows, with_regression, settings=settings)
    torch.manual_seed(0)
    model, data = case.model(), case.data()
    opt = Sophia(model, lr=0.01, update_every=1, **settings)
    heard = said(lambda: [case.step(model, opt, data) for _ in range(3)])
    assert sum("beside the outputs that Heads" in each for each in heard) == 1
    assert opt.stats()["refreshes"] == 3


def test_outputs_that_go_into_the_model_again_are_none_of_the_loss():
    """Backpropagation through time: the states' gradient taken for a part of the loss."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

        def forward(self, x, state=None):
            out, state = self.lstm(x, state)
            return self.head(out), state

    model = Recurrent()
    opt = Sophia(model, lr=0.01, update_every=1)
    x, y = torch.randn(3, 8, 4), torch.randint(0, 5, (3, 8))

    def run():
        for _ in range(3):
            first, state = model(x[:, :4])
            second, _ = model(x[:, 4:], state)
            cross_entropy(torch.cat([first, second], 1), y).backward()
            opt.step()
            opt.zero_grad()

    assert outcome(run) == (None, [])


def test_a_loss_of_a_tensor_that_is_returned_in_parts():
    """Several streams of logits, of which the first alone was counted: all are found in the loss."""

    class Streams(Words):
        def forward(self, ids, y, whole):
            z = torch.stack([super().forward(ids), super().forward(ids.flip(1))], 1)
            targets = torch.stack([y, y], 1)
            if whole:
                return z
            loss = F.cross_entropy(z.flatten(0, 2), targets.flatten())
            return {"loss": loss, "logits": z[:, 0], "ngrams": z[:, 1:]}

    ids, y = sentences((6, 6))
    found = []
    for whole in (False, True):
        torch.manual_seed(0)
        model = Streams()
        opt = Sophia(model, lr=0.01, update_every=1, fraction=1.0)

        def run(model=model, opt=opt, whole=whole):
            output = model(ids, y, whole)
            loss = cross_entropy(output, torch.stack([y, y], 1)) if whole else output["loss"]
            loss.backward()
            opt.step()

        assert outcome(run) == (None, [])
        assert opt.stats()["B"] == 24
        found.append([opt.state[p]["hessian"] for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_kin_of_tensors_in_a_graph():
    """A head taken for a hidden state, or a hidden state for a head."""
    x = torch.randn(3, 4, requires_grad=True)
    hidden = x.tanh()
    logits, head = hidden @ hidden.T, hidden.sin()
    left, right = hidden.split(2, 1)
    kin = kin_of([logits, left], [hidden, head, logits.softmax(-1), right, head.cos()])
    assert [k.above for k in kin] == [True, False, False, False, False]
    assert [k.below for k in kin] == [(), (), (0,), (), ()]
    assert [k.parts for k in kin] == [(1, 4), (4,), (), (), ()]
    assert not any(k.hidden for k in kin)
