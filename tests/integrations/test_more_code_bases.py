"""Logits in chunks, hidden states whose head the loss applies, and a recurrent state that is carried over: in
the manner of LitGPT, torchtitan and pytorch/examples' word_language_model.
"""

import itertools
from dataclasses import replace

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


class Decoder(nn.Module):
    """Tokens to hidden states, and a head."""

    def __init__(self):
        super().__init__()
        self.wte, self.layers = nn.Embedding(V, D), nn.ModuleList([Block(bias=False)])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def hidden(self, ids):
        x = self.wte(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


# ---- LitGPT ----


class Lit(Decoder):
    """Logits under a soft cap; in a list of chunks if that is asked for."""

    def cap(self, z):
        return 5 * torch.tanh(z / 5)

    def logits(self, ids):
        return self.cap(self.head(self.hidden(ids)))

    def forward(self, ids, lm_head_chunk_size=0):
        x = self.hidden(ids)
        if lm_head_chunk_size == 0:
            return self.cap(self.head(x))
        return [self.cap(self.head(part)) for part in x.split(lm_head_chunk_size, dim=1)]


def loss_in_chunks(logits, targets, size):
    """Of a list of logits, or of a tensor that is cut here: a mean over what counts."""
    if isinstance(logits, list):
        ends = targets.split([part.shape[1] for part in logits], dim=1)
        both = [(z.flatten(0, 1), y.flatten()) for z, y in zip(logits, ends, strict=True)]
    else:
        both = list(zip(logits.flatten(0, 1).split(size), targets.flatten().split(size), strict=True))
    losses = [F.cross_entropy(z, y, ignore_index=-100, reduction="none") for z, y in both]
    counted = (targets != -100).sum()
    return torch.cat(losses).sum() / counted.maximum(torch.ones_like(counted))


def train_lit(model, optimizer, lr, *, compiled=False):
    """Pre-training: rates that the loop writes, accumulation, clipping."""
    called = torch.compile(model, backend="aot_eager") if compiled else model
    batches = itertools.cycle(pairs(2, 4))
    for iteration in itertools.count(1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, iteration / 10)
        x, y = next(batches)
        loss = loss_in_chunks(called(x), y, 8)
        (loss / 2).backward()
        if iteration % 2 == 0:
            torch.nn.utils.clip_grad_norm_(called.parameters(), max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()


def class_path(path, parameters, **settings):
    """As a configuration names an optimizer: a class, and its arguments."""
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)(parameters, **settings)


LIT = CodeBase(
    model=Lit,
    adamw=lambda model, lr: class_path("torch.optim.AdamW", model.parameters(), lr=lr),
    sophia=lambda model, **settings: class_path("sophia.Sophia", model.parameters(), **settings),
    train=train_lit,
    logits=lambda model: [[model.logits(x) for x, _ in pairs(2, 4)]],
    loss=lambda z, _: sum(mean(a, y) for a, (_, y) in zip(z, pairs(2, 4), strict=True)) / 2,
    counted=48,
)


def conversations():
    """Rows that begin with a prompt, which does not count: the first chunk is nothing but prompt in most."""
    ids = tokens(8, T)
    prompts = torch.tensor([3, 3, 3, 1, 4, 3, 3, 3])[:, None]
    return ids, ids.masked_fill(torch.arange(T)[None] < prompts, -100)


def train_lit_on_conversations(model, optimizer, lr):
    """Fine-tuning: the last chunk is cut by one, as the labels are shifted outside of the model."""
    ids, labels = conversations()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    while True:
        logits = model(ids, lm_head_chunk_size=2)
        logits[-1] = logits[-1][..., :-1, :]
        loss = loss_in_chunks(logits, labels[..., 1:], 2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.detach()


LIT_CHUNKS = CodeBase(
    model=Lit,
    adamw=LIT.adamw,
    sophia=LIT.sophia,
    train=train_lit_on_conversations,
    logits=lambda model: [model.logits(conversations()[0])],
    loss=lambda z, _: mean(z[:, :-1], conversations()[1][:, 1:]),
    counted=int((conversations()[1][:, 1:] >= 0).sum()),
)


# ---- torchtitan ----


class Titan(Decoder):
    """Logits; or the hidden states, where the loss applies the head."""

    skip_head = False

    def logits(self, ids):
        return self.head(self.hidden(ids))

    def forward(self, ids):
        return self.hidden(ids) if self.skip_head else self.logits(ids)


class Handed(torch.autograd.Function):
    """A loss whose gradient in the hidden states is known already."""

    @staticmethod
    def forward(ctx, states, gradient, loss):
        ctx.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None, None


def sum_over(pred, labels, counted):
    return mean(pred.float(), labels, reduction="sum", ignore_index=-100) / counted


def sum_in_chunks(states, labels, counted, head):
    """Each chunk of the hidden states is a leaf that has its own backward; the model's comes at the end."""
    total, gradients = states.new_zeros(()), []
    for part, y in zip(states.chunk(3, 1), labels.chunk(3, 1), strict=True):
        part = part.detach().contiguous().requires_grad_()
        loss = sum_over(head(part), y, counted)
        loss.backward()
        total = total + loss.detach()
        gradients.append(part.grad)
    return Handed.apply(states, torch.cat(gradients, 1), total)


def train_titan(model, optimizer, lr, *, compiled=False, chunks=False):
    """Sums over the labels of all micro-batches together; gradients are cleared before the step."""
    model.skip_head = chunks
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    loss_of = sum_over
    if compiled:
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        loss_of = torch.compile(sum_over, backend="aot_eager")
    while True:
        optimizer.zero_grad()
        batches = pairs(2, 4, padding=-100)
        counted = sum((y != -100).sum() for _, y in batches)
        total = 0.0
        for x, y in batches:
            pred = model(x)
            if model.skip_head:
                loss = sum_in_chunks(pred, y, counted, model.head)
            else:
                loss = loss_of(pred, y, counted)
            del pred
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        yield total


def padded_labels():
    return int(sum((y >= 0).sum() for _, y in pairs(2, 4, padding=-100)))


TITAN = CodeBase(
    model=Titan,
    adamw=lambda model, lr: torch.optim.AdamW(list(model.named_parameters()), lr=lr, fused=True),
    sophia=lambda model, **settings: Sophia(list(model.named_parameters()), **settings, fused=True),
    train=train_titan,
    logits=LIT.logits,
    loss=lambda z, _: (
        sum(mean(a, y, reduction="sum") for a, (_, y) in zip(z, pairs(2, 4, padding=-100), strict=True))
        / padded_labels()
    ),
    counted=padded_labels(),
)


# ---- word_language_model ----


class Recurrent(nn.Module):
    """Time first; log-probabilities of all positions in one dimension, and the state."""

    def __init__(self, tied=True, dropout=0.0):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(dropout), nn.Embedding(V, D)
        self.rnn, self.decoder = nn.LSTM(D, D, 1), nn.Linear(D, V)
        nn.init.normal_(self.encoder.weight, std=0.5)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, ids, state):
        output, state = self.rnn(self.drop(self.encoder(ids)), state)
        decoded = self.decoder(self.drop(output)).view(-1, V)
        return F.log_softmax(decoded, dim=1), state


def text():
    """Two stretches of four streams, time first."""
    ids = tokens(4, 2 * T + 1).t().contiguous()
    return [(ids[i : i + T], ids[i + 1 : i + 1 + T].reshape(-1)) for i in (0, T)]


def train_recurrent(model, optimizer, lr):
    """Epochs of two batches; the state goes over from one to the next, without its history."""
    while True:
        model.train()
        state = (torch.zeros(1, 4, D), torch.zeros(1, 4, D))
        for ids, targets in text():
            optimizer.zero_grad()
            state = tuple(part.detach() for part in state)
            output, state = model(ids, state)
            loss = F.nll_loss(output, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
            yield loss.detach()


def logits_of_recurrent(model):
    """Of both batches, each from the state that the loop hands it."""
    (first, _), (second, _) = text()
    zero = next(model.parameters()).new_zeros(1, 4, D)
    output, state = model(first, (zero, zero))
    return [output, model(second, tuple(part.detach() for part in state))[0]]


RECURRENT = CodeBase(
    model=Recurrent,
    adamw=lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr),
    sophia=lambda model, **settings: Sophia(model.parameters(), **settings),
    train=train_recurrent,
    logits=logits_of_recurrent,
    # Log-probabilities are logits of themselves: as such they have the curvature.
    loss=lambda z, i: F.cross_entropy(z, text()[i][1]),
    counted=4 * T,
)


# ---- what holds ----

ALL = {"LitGPT": LIT, "LitGPT, chunks": LIT_CHUNKS, "torchtitan": TITAN, "word_language_model": RECURRENT}


@pytest.mark.parametrize("name", ALL)
def test_this_loop_trains_with_one_line_changed(name):
    check_that_it_trains(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_mean_of_h_is_the_curvature_of_what_this_loop_trains(name):
    check_mean_of_h(ALL[name])


def test_a_head_that_the_loss_applies_in_chunks():
    check_that_it_trains(TITAN, chunks=True)
    check_twins(TITAN, {"chunks": True}, {})


@pytest.mark.parametrize(
    ("name", "settings"), [("LitGPT", {}), ("torchtitan", {}), ("torchtitan", {"chunks": True})]
)
def test_compiled_parts_have_the_same_h(name, settings):
    torch._dynamo.reset()
    check_twins(ALL[name], {"compiled": True, **settings}, {})


def test_dropout_in_a_recurrent_model_is_no_matter():
    """Rows are proved independent with dropout held still."""
    check_that_it_trains(replace(RECURRENT, model=lambda: Recurrent(tied=False, dropout=0.2)))
