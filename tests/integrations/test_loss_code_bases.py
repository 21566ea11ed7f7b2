"""Models that hand back their loss alone: in the manner of modded-nanogpt's simple script, lingua and
x-transformers.
"""

import itertools

import pytest
import torch
from code_bases import (
    Block,
    CodeBase,
    D,
    T,
    V,
    check_mean_of_h,
    check_that_it_trains,
    check_twins,
    mean,
    pairs,
    tokens,
)
from torch import nn
from torch.nn import functional as F

from sophia import Sophia

# ---- modded-nanogpt, the simple script ----


class Gains(nn.Module):
    """A functional norm with gains of its own."""

    def __init__(self, width):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), weight=self.gains.type_as(x))


class Modded(nn.Module):
    """The sum of the losses, of logits under a soft cap, with a table in bfloat16, and values that a table of
    their own adds.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D).bfloat16()
        self.values = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([Block(norm=Gains), Block(norm=Gains)])
        self.skips = nn.Parameter(torch.full((1,), 0.5))
        self.proj = nn.Linear(D, V)
        self.norm1, self.norm2 = Gains(D), Gains(D)

    def logits(self, inputs):
        x = first = self.norm1(self.embed(inputs).type_as(self.values.weight))
        x = self.blocks[0](x + 0.1 * self.values(inputs))
        x = self.blocks[1](x + self.skips * first)
        z = self.proj(self.norm2(x))
        z = z.float() if z.dtype == torch.bfloat16 else z
        return 15 * z * (z.square() + 15**2).rsqrt()

    def forward(self, inputs, targets):
        z = self.logits(inputs)
        return F.cross_entropy(z.view(targets.numel(), -1), targets.view(-1), reduction="sum")


def groups_of_modded(model, lr):
    return [
        {"params": [model.embed.weight, model.values.weight], "lr": 3 * lr},
        {"params": [model.proj.weight], "lr": 0.4 * lr},
        {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 1.5 * lr},
    ]


def train_modded(model, optimizer, lr, *, compiled=False):
    """Two optimizers, a rate that goes down, gradients that the model clears."""
    hidden = [p for p in model.blocks.parameters() if p.ndim >= 2]
    optimizers = [optimizer, torch.optim.SGD(hidden, lr=0.01 * lr, momentum=0.95, nesterov=True)]
    if compiled:
        model.compile(backend="aot_eager", dynamic=False)
    for each in optimizers:
        for group in each.param_groups:
            group["initial_lr"] = group["lr"]
    for step in itertools.count():
        if step % 20 == 0:
            model.eval()
            with torch.no_grad():
                sum(model(x, y) for x, y in pairs(2, 4)) / 48
            model.train()
        total = 0.0
        for x, y in pairs(2, 4):
            loss = model(x, y)
            loss.backward()
            total = total + loss.detach()
        assert all(p.grad is not None for p in model.parameters())
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = group["initial_lr"] * min(1.0, 2 - step / 100)
        for each in optimizers:
            each.step()
        model.zero_grad(set_to_none=True)
        yield total / 48


MODDED = CodeBase(
    model=Modded,
    adamw=lambda model, lr: torch.optim.AdamW(groups_of_modded(model, lr), betas=(0.8, 0.95)),
    sophia=lambda model, lr, **settings: Sophia(groups_of_modded(model, lr), lr=lr, **settings),
    train=train_modded,
    logits=lambda model: [[model.logits(x) for x, _ in pairs(2, 4)]],
    loss=lambda z, _: sum(mean(a, y, reduction="sum") for a, (_, y) in zip(z, pairs(2, 4), strict=True)),
    counted=48,
    slack=0.02,
)


# ---- lingua ----


class RootMeanSquare(nn.Module):
    """A norm that is computed in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x.float() if x.dtype == torch.bfloat16 else x
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.weight


class TiedOutput(nn.Module):
    """A module around a table that is another module's."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return F.linear(x, self.table.weight)


class Lingua(nn.Module):
    """The loss alone, from log-probabilities in float32; logits where there is no target."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(V, D)
        self.layers = nn.ModuleList([Block(norm=RootMeanSquare, bias=False)])
        self.norm = RootMeanSquare(D)
        self.output = TiedOutput(self.tok_embeddings)
        nn.init.normal_(self.tok_embeddings.weight, std=0.5)

    def logits(self, tokens):
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.output(self.norm(h))

    def forward(self, tokens, target=None):
        logits = self.logits(tokens)
        if target is None:
            return logits
        log_probabilities = F.log_softmax(logits.flatten(end_dim=-2).float(), -1)
        return F.nll_loss(log_probabilities, target.flatten(end_dim=-1))


def train_lingua(model, optimizer, lr, *, compiled=False):
    """A probe whose gradients are thrown away, a loss that is divided in place of itself, a schedule."""
    called = torch.compile(model, backend="aot_eager") if compiled else model
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    for step in itertools.count():
        if step % 20 == 7:
            x, y = pairs(1, 2)[0]
            called(x, y).backward()
            optimizer.zero_grad()
            assert next(model.parameters()).grad is None
        for x, y in pairs(2, 4):
            loss = called(x, y)
            loss = loss / 2
            loss.backward()
            loss = loss.detach() * 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0, foreach=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss


LINGUA = CodeBase(
    model=Lingua,
    adamw=lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True),
    sophia=lambda model, **settings: Sophia(model.parameters(), **settings, fused=True),
    train=train_lingua,
    logits=MODDED.logits,
    loss=lambda z, _: sum(mean(a, y) for a, (_, y) in zip(z, pairs(2, 4), strict=True)) / 2,
    counted=48,
)


# ---- x-transformers ----


class Net(nn.Module):
    """Logits."""

    def __init__(self):
        super().__init__()
        self.token_emb, self.pos_emb = nn.Embedding(V, D), nn.Embedding(T + 1, D)
        self.layers = nn.ModuleList([Block()])
        self.to_logits = nn.Linear(D, V, bias=False)

    def forward(self, ids, return_intermediates=False):
        x = self.token_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        hiddens = []
        for layer in self.layers:
            x = layer(x)
            hiddens.append(x)
        logits = self.to_logits(x)
        return (logits, {"hiddens": hiddens}) if return_intermediates else logits


class Wrapper(nn.Module):
    """Cuts a row into inputs and targets, puts the classes second, and hands back the loss alone, or with all
    that there is.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def logits(self, row):
        return self.net(row.clamp(min=0))[:, :-1]

    def forward(self, row, return_outputs=False):
        inputs, target = torch.where(row == -100, 0, row), row[:, 1:]
        logits, cache = self.net(inputs, return_intermediates=True)
        logits = logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=-100)
        return (loss, (logits, cache)) if return_outputs else loss


def rows_of_text():
    """Two micro-batches of rows of unlike lengths."""
    ids = tokens(8)
    past = torch.arange(T + 1)[None] >= torch.tensor([7, 6, 5, 4, 3, 7, 7, 2])[:, None]
    return ids.masked_fill(past, -100).split(4)


def train_wrapped(model, optimizer, lr, *, outputs=False):
    """Two micro-batches, a validation after the step."""
    batches = itertools.cycle(rows_of_text())
    for step in itertools.count():
        model.train()
        for _ in range(2):
            loss = model(next(batches), return_outputs=outputs)
            loss = loss[0] if outputs else loss
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            model.eval()
            with torch.no_grad():
                model(tokens(2, seed=3))
        yield loss.detach()


WRAPPED = CodeBase(
    model=lambda: Wrapper(Net()),
    adamw=lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    sophia=lambda model, **settings: Sophia(model.parameters(), **settings),
    train=train_wrapped,
    logits=lambda model: [[model.logits(row) for row in rows_of_text()]],
    loss=lambda z, _: (
        sum(mean(a, row[:, 1:], ignore_index=-100) for a, row in zip(z, rows_of_text(), strict=True)) / 2
    ),
    counted=int(sum((row[:, 1:] >= 0).sum() for row in rows_of_text())),
)


# ---- what holds ----

ALL = {"modded-nanogpt": MODDED, "lingua": LINGUA, "x-transformers": WRAPPED}


@pytest.mark.parametrize("name", ALL)
def test_it_trains_on_its_loss_alone_with_one_line_changed(name):
    check_that_it_trains(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_mean_of_h_is_the_curvature_of_the_loss_that_it_returns(name):
    check_mean_of_h(ALL[name])


@pytest.mark.parametrize("name", ["modded-nanogpt", "lingua"])
def test_its_loss_in_a_compiled_graph_has_the_same_h(name):
    torch._dynamo.reset()
    check_twins(ALL[name], {"compiled": True}, {})


def test_a_wrapper_that_hands_back_all_that_there_is():
    """Its logits among other things, in a tuple inside of a tuple."""
    check_twins(WRAPPED, {"outputs": True}, {})
