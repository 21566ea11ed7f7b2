"""Which part of a batch a refresh runs: a sample, whatever the order of the data; and only rows that are
independent, which is found out by running them.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia, SophiaWarning
from sophia.refresh.independence import Still

MANUAL = {"lr": 0.0, "weight_decay": 0.0, "update_every": 1}


def mean_of_h(model, loss_of, parameter, *, steps, **settings):
    """The mean of single estimates of one parameter's h over so many refreshes."""
    opt = Sophia(model, betas=(0.9, 0.0), **MANUAL, **settings)
    total = torch.zeros_like(parameter)
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
        total += opt.state[parameter]["hessian"]
    return total / steps


def exact_bias_curvature(logits):
    """Of a bias that is added to the logits of a mean cross-entropy: the mean of p (1 - p)."""
    p = torch.softmax(logits, -1)
    return (p * (1 - p)).mean(0)


def of_two_kinds(ordered):
    """Rows of one kind, then rows of another; in this order or shuffled."""
    x = torch.zeros(32, 2)
    x[:16, 0] = x[16:, 1] = 1
    return x if ordered else x[torch.randperm(32, generator=torch.Generator().manual_seed(0))]


def test_rows_in_an_order_are_sampled():
    """The first rows alone: every negative of an ordered batch has no curvature at all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    y = torch.tensor([0] * 16 + [1] * 16)
    found = {}
    for ordered in (True, False):
        x = of_two_kinds(ordered)
        found[ordered] = mean_of_h(
            net, lambda m, x=x: F.cross_entropy(m(x), y), net[0].weight, steps=400
        ).sum(0)
    torch.testing.assert_close(found[True], found[False], rtol=0.25, atol=0.0)
    assert float(found[True].min()) > 0


def test_the_two_forwards_of_a_gan_step_both_come_in():
    """Real, then generated, one step: generated ones that are never replayed."""
    net = nn.Linear(3, 2)
    real, generated = torch.tensor([[1.0, 0, 0]] * 8), torch.tensor([[0, 1.0, 0]] * 8)

    def loss(model):
        return F.cross_entropy(model(real), torch.ones(8).long()) + F.cross_entropy(
            model(generated), torch.zeros(8).long()
        )

    columns = mean_of_h(net, loss, net.weight, steps=200).sum(0)
    assert float(columns[0]) == pytest.approx(float(columns[1]), rel=0.5)
    assert float(columns[2]) == 0


@pytest.mark.parametrize("where", ["first", "random"])
def test_rows_without_a_label_cost_no_refresh(where):
    """A first row that is all prompt: never a refresh, with a warning about every label."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt = Sophia(model, **MANUAL)
    for step in range(15):
        y = torch.randint(0, 3, (8,))
        y[0 if where == "first" else step % 8] = -100
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(8, 4)), y).backward()
        opt.step()
        assert opt.stats()["B"] == 1  # an eighth of eight rows, and one that counts
    assert (opt.stats()["refreshes"], opt.stats()["skipped"]) == (15, 0)


def test_a_micro_batch_without_labels_is_not_the_one_that_is_taken():
    """One empty micro-batch of an accumulation in the place of one that says something."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    opt = Sophia(model, **MANUAL)
    for _ in range(8):
        opt.zero_grad()
        for empty in (True, False, False, True):
            y = torch.randint(0, 3, (8,))
            loss = F.cross_entropy(model(torch.randn(8, 4)), y, reduction="sum") / 16
            (loss * (0 if empty else 1)).backward()
        opt.step()
        assert opt.stats()["B"] == 8
    assert opt.stats()["skipped"] == 0


def test_the_part_stands_for_the_whole():
    """Rows of unequal curvature, a quarter of them: biased towards what is drawn more often, or off by the
    share.
    """
    net = nn.Linear(1, 3, bias=True)
    nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
        net.weight.copy_(torch.tensor([[3.0], [0.0], [0.0]]))
    x = torch.tensor([[0.0]] * 8 + [[1.0]] * 8)
    got = mean_of_h(
        net, lambda m: F.cross_entropy(m(x), torch.zeros(16).long()), net.bias, steps=3000, fraction=0.25
    )
    torch.testing.assert_close(got, exact_bias_curvature(net(x).detach()), rtol=0.12, atol=0.0)


@pytest.mark.parametrize(("classes", "batch"), [(2, 8), (4, 1)])
def test_a_zero_that_is_right_is_averaged(classes, batch):
    """Passes whose labels all agree are zero by right; without them h is truth / P(not zero): 12.7 here."""
    net = nn.Linear(1, classes)
    nn.init.zeros_(net.weight)
    with torch.no_grad():
        net.bias.zero_()
        net.bias[0] = 4.6
    x, y = torch.ones(batch, 1), torch.zeros(batch, dtype=torch.long)
    got = mean_of_h(net, lambda m: F.cross_entropy(m(x), y), net.bias, steps=4000)
    exact = exact_bias_curvature(net(x).detach())
    torch.testing.assert_close(got[0], exact[0], rtol=0.25, atol=0.0)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = nn.GRU(3, 4), nn.Linear(4, 5)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Contrast(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.a(x) @ self.b(x).T


class Masked(nn.Module):
    """A mask over positions that has as many rows as the batch, by chance."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.out = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x, mask):
        scores = self.up(x) @ self.up(x).transpose(1, 2)
        return self.out(torch.softmax(scores + mask, -1) @ self.up(x))


class Normed(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5))


CAUSAL = torch.full((8, 8), -torch.inf).triu(1)
DEPENDENT = {
    "contrast over the batch": (Contrast, (torch.randn(8, 3),)),
    "a mask as long as the batch": (Masked, (torch.randn(8, 8, 3), CAUSAL)),
    "BatchNorm": (Normed, (torch.randn(16, 3),)),
}


@pytest.mark.parametrize("case", DEPENDENT)
def test_rows_that_are_not_independent_are_not_cut(case):
    """The curvature of another model: 30 times the truth under BatchNorm, zero in a recurrence."""
    make, inputs = DEPENDENT[case]
    model = make()
    opt = Sophia(model, **MANUAL)
    for step in range(3):
        opt.zero_grad()
        output = model(*inputs)
        F.cross_entropy(output.flatten(0, -2), torch.zeros(output[..., 0].numel()).long()).backward()
        if step:
            opt.step()  # said once
        else:
            with pytest.warns(SophiaWarning, match=f"rows of a batch of {make.__name__} are not independent"):
                opt.step()
        assert opt.stats()["B"] == output[..., 0].numel()


def one_step(opt, output):
    F.cross_entropy(output.flatten(0, -2), torch.zeros(output[..., 0].numel()).long()).backward()
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("batch_dim", [None, 1])
@pytest.mark.parametrize("times", [6, 24])
def test_rows_are_found_behind_the_time(times, batch_dim):
    """The default of torch's recurrent layers: rows in the second dimension, run whole for ever."""
    model = TimeFirst()
    opt = Sophia(model, batch_dim=batch_dim, **MANUAL)
    one_step(opt, model(torch.randn(times, 16, 3)))
    assert (opt.stats()["B"], opt.stats()["share"]) == (2 * times, 1 / 8)


class Flat(nn.Module):
    """A model around one whose outputs have all positions in one dimension."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).flatten(0, -2)


class BatchFirst(TimeFirst):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("make", [TimeFirst, BatchFirst])
@pytest.mark.parametrize("times", [5, 16])
def test_rows_are_found_where_all_positions_lie_in_one_dimension(make, times):
    """Logits of shape (T B, V) are what many recurrent models return: each position taken for a row, of which
    there is none in the inputs, the whole is run for ever. The same rows give the same h.
    """
    x = torch.randn((times, 16, 3) if make is TimeFirst else (16, times, 3))
    y = torch.zeros(x.shape[:2]).long()
    y[(slice(None), slice(4, 6)) if make is TimeFirst else slice(4, 6)] = -100  # rows that do not count
    found = []
    for flat in (False, True):
        model = make()
        opt = Sophia(Flat(model) if flat else model, **{**MANUAL, "fraction": 0.25})
        for _ in range(3):
            z = opt._model(x)
            F.cross_entropy(z.flatten(0, z.ndim - 2), y.flatten()).backward()
            opt.step()
            opt.zero_grad()
        assert (opt.stats()["B"], opt.stats()["share"]) == (4 * times, pytest.approx(4 / 14))
        found.append([opt.state[p]["hessian"] for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_dim_that_is_none_is_proved_wrong():
    """The user's word is taken for the place, not for the independence."""
    model = TimeFirst()
    opt = Sophia(model, batch_dim=0, **MANUAL)
    with pytest.warns(SophiaWarning, match="rows of a batch of TimeFirst are not independent"):
        one_step(opt, model(torch.randn(6, 16, 3)))
    assert opt.stats()["share"] == 1.0
    with pytest.raises(ValueError, match="batch_dim=-1: the dimension of the outputs"):
        Sophia(model, batch_dim=-1)


class ZeroAtFirst(nn.Module):
    """A residual block and a head that begin as zero, around what mixes the batch."""

    def __init__(self, small):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.block, self.head = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.full((3,), small))
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(x + self.scale * self.block(self.norm(x)))


@pytest.mark.parametrize("small", [0.0, 1e-6])
def test_what_begins_as_zero_is_not_taken_for_independence(small):
    """With all outputs zero, or a block switched off, any cut looks right: at the first refresh alone,
    which is when it is proved.
    """
    model = ZeroAtFirst(small)
    before = [p.detach().clone() for p in model.parameters()]
    opt = Sophia(model, **MANUAL)
    with pytest.warns(SophiaWarning, match="rows of a batch of ZeroAtFirst are not independent"):
        one_step(opt, model(torch.randn(16, 3)))
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


class Packed(nn.Module):
    """Running means over the documents of a row, which positions or numbers tell apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, ids, position_ids=None, documents=None):
        if position_ids is not None:
            documents = (position_ids == 0).cumsum(-1)
        h = self.embed(ids)
        if documents is None:
            return self.out(torch.tanh(h.cumsum(1)))
        same = (documents[:, :, None] == documents[:, None]).tril()
        return self.out(torch.tanh(same.to(h.dtype) @ h))


LENGTHS = [5, 3, 9, 4, 2, 7, 6, 4]
DOCUMENTS = {
    "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    "documents": torch.cat([torch.full((n,), i + 1) for i, n in enumerate(LENGTHS)])[None],
}


@pytest.mark.parametrize("told_by", DOCUMENTS)
def test_a_packed_row_gives_some_of_its_documents(told_by):
    """One row of 4,096 tokens, as packing makes it of every micro-batch: a refresh as dear as the step."""
    model = Packed()
    opt = Sophia(model, **MANUAL)
    seen = set()
    for _ in range(90):
        one_step(opt, model(torch.randint(0, 9, (1, 40)), **{told_by: DOCUMENTS[told_by]}))
        seen.add(int(opt.stats()["B"]))
    assert seen == set(LENGTHS)  # one whole document each time, drawn from all


class PackedByEnds(Packed):
    """Documents told by where they end, as kernels for packed rows want it."""

    def forward(self, ids, position_ids, cu_seqlens):
        assert cu_seqlens[-1] == ids.shape[1]  # a kernel would read what is not there
        places = torch.arange(ids.shape[1])[None]
        return super().forward(ids, documents=torch.bucketize(places, cu_seqlens[1:], right=True))


def test_ends_of_documents_are_cut_with_the_row():
    """Ends of the whole row, handed over with some of its documents."""
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    opt = Sophia(model := PackedByEnds(), **MANUAL)
    seen = set()
    for _ in range(40):
        one_step(opt, model(torch.randint(0, 9, (1, 40)), DOCUMENTS["position_ids"], ends))
        seen.add(int(opt.stats()["B"]))
    assert seen == set(LENGTHS)


def test_a_packed_row_of_unequal_documents_is_sampled_without_bias():
    """Long documents and short ones weigh by their tokens in the loss, and are drawn alike."""
    model = Packed()
    ids = torch.randint(0, 9, (1, 40), generator=torch.Generator().manual_seed(0))

    def h(fraction, steps):
        return mean_of_h(
            model,
            lambda m: F.cross_entropy(m(ids, documents=DOCUMENTS["documents"])[0], ids[0]),
            model.out.weight,
            steps=steps,
            fraction=fraction,
        )

    torch.testing.assert_close(h(0.25, 2000).sum(0), h(1.0, 1000).sum(0), rtol=0.2, atol=0.0)


def test_a_row_that_cannot_be_divided_is_said_with_its_cost():
    """Every refresh costs what a step costs, in silence."""
    model = Packed()
    opt = Sophia(model, **MANUAL)
    with pytest.warns(SophiaWarning, match="has one row.*update_every 8 times as large"):
        one_step(opt, model(torch.randint(0, 9, (1, 40))))
    one_step(opt, model(torch.randint(0, 9, (1, 40))))
    assert opt.stats()["share"] == 1.0


def test_a_row_of_tokens_that_do_not_see_each_other_gives_some_of_them():
    """A table of bigrams in one row: exact, an eighth of the price."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    opt = Sophia(model, **MANUAL)
    one_step(opt, model(torch.randint(0, 9, (1, 40))))
    assert opt.stats()["share"] == 1 / 8


def test_random_layers_and_dropout_do_not_look_like_dependence():
    """Two runs whose masks differ: every model with dropout would be run whole."""

    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.drop, self.out = nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 5)

        def forward(self, x):
            h = self.drop(F.dropout(self.up(x), 0.3))
            h = h + torch.rand(()) * h if float(torch.rand(())) < 0.5 else h + torch.randn_like(h)
            return self.out(h)

    model = Random()
    opt = Sophia(model, **MANUAL)
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(16, 3)), torch.zeros(16).long()).backward()
        opt.step()
        assert opt.stats()["B"] == 2


def test_the_proof_is_made_once_a_kind_of_input():
    """Two more forwards at every refresh; or one proof taken for inputs that it does not cover."""
    calls = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 5)

        def forward(self, x, other=None):
            calls.append(x.shape[0])
            return self.out(x)

    model = Counted()
    opt = Sophia(model, **MANUAL)

    def forwards(*inputs):
        calls.clear()
        opt.zero_grad()
        F.cross_entropy(model(*inputs), torch.zeros(16).long()).backward()
        opt.step()
        return list(calls)

    x = torch.randn(16, 3)
    # training; the repetition; whole and part of the proof that rows are independent; the refresh
    assert forwards(x) == [16, 16, 16, 2, 2]
    assert forwards(x) == [16, 2]
    assert forwards(x, torch.ones(7)) == [16, 16, 16, 2, 2]
    assert forwards(x, torch.ones(9)) == [16, 2]
    assert forwards(x, torch.ones(16)) == [16, 16, 2, 2]  # as long as the batch: it would be cut


def test_what_is_random_stands_still():
    """A generator that moved on, or noise that is left in."""
    before = torch.get_rng_state()
    x = torch.ones(2, 3)
    with Still():
        for function in (
            lambda: F.dropout(x, 0.5),
            lambda: torch.rand(4),
            lambda: torch.randperm(4),
            lambda: x.new_empty(3).bernoulli_(0.5),
            lambda: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
        ):
            assert torch.equal(function(), function())
    assert torch.equal(torch.get_rng_state(), before)
