"""The weight of each prediction in the loss: h is the curvature of the user's own loss, whatever its
reduction, its weights and what the host does to ``.grad``.
"""

import pytest
import teams
import torch
import torch.distributed as dist
from curvature_cases import (
    ONE_STEP,
    SIGMAS,
    SPREAD,
    Case,
    Words,
    check_curvature,
    classifier,
    cross_entropy,
    differences,
    per_token,
    rows,
    sentences,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from oracle import gauss_newton
from sophia import Sophia

CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
ROW_WEIGHTS = torch.linspace(0.1, 3.0, 13)
DEFAULT = {"fraction": 1 / 8}


def classes(loss, **settings):
    return Case(classifier, rows, loss, **settings)


def tokens(loss, **settings):
    return Case(Words, sentences, loss, **settings)


def plain(z, data):
    return F.cross_entropy(z, data[1])


def by_class(z, data, **settings):
    return F.cross_entropy(z, data[1], weight=CLASS_WEIGHTS.to(z.dtype), **settings)


def by_row(z, data):
    return (ROW_WEIGHTS.to(z.dtype) * F.cross_entropy(z, data[1], reduction="none")).mean()


def of_sequence_means(z, data):
    counted = data[1] >= 0
    return ((per_token(z, data[1]) * counted).sum(1) / counted.sum(1)).mean()


def total(z, data):
    return cross_entropy(z, data[1], reduction="sum")


def soft(z, data):
    q = torch.softmax(data[0][:, :1] * torch.arange(5.0, dtype=z.dtype), -1)
    return F.cross_entropy(z, q)


def ranked(z, data):
    """A rank at a time: weights fall with the place in the sequence, and some are zero."""
    place = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0, 0.0], dtype=z.dtype)
    return (per_token(z, data[1]) * place).sum() / 7


# ---- loops ----


def parts_of(data, n=4):
    x, y = data
    return list(zip(x.chunk(n), y.chunk(n), strict=True))


def accumulated(divisor=1.0, then=None):
    """Four micro-batches, each with its own mean over ``divisor``."""

    def loop(model, opt, data, case):
        for x, y in parts_of(data):
            (F.cross_entropy(model(x), y) / divisor).backward()
        if then is not None:
            then(model)
        opt.step()

    return loop


def of_parts(divisor=1.0):
    def loss(z, data):
        ends = zip(z, data[1].chunk(4), strict=True)
        return sum(F.cross_entropy(a, b) for a, b in ends) / divisor

    return loss


def in_parts(model, data):
    return [model(x) for x, _ in parts_of(data)]


def accumulating(divisor_of_loss, divisor, then=None, **settings):
    """The oracle's loss is divided by ``divisor`` in all, that of the loop by ``divisor_of_loss``."""
    return Case(
        classifier,
        rows,
        of_parts(divisor),
        outputs=in_parts,
        loop=accumulated(divisor_of_loss, then),
        **settings,
    )


def divide(by):
    def then(model):
        for p in model.parameters():
            p.grad /= by

    return then


def divide_and_clip(model):
    divide(4)(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def tokens_divided_later(model, opt, data, case):
    """The sum of the loss, and the gradient over the count of tokens when all micro-batches are known."""
    total(model(data[0]), data).backward()
    divide((data[1] >= 0).sum())(model)
    opt.step()


def of_all_tokens(model, opt, data, case):
    """The count of the accumulated batch as the divisor of each micro-batch."""
    for x, y in parts_of(data):
        (cross_entropy(model(x), y, reduction="sum") / (data[1] >= 0).sum()).backward()
    opt.step()


def clipped(model, opt, data, case):
    case.loss(case.outputs(model, data), data).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    opt.step()


def scaled(dtype=None, init_scale=2.0**16):
    """A GradScaler as torch's documentation has it."""
    scalers = {}

    def loop(model, opt, data, case):
        scaler = scalers.setdefault(id(opt), torch.amp.GradScaler("cpu", init_scale=init_scale))
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = case.loss(case.outputs(model, data), data)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()

    return loop


def autocast(dtype):
    def loop(model, opt, data, case):
        with torch.autocast("cpu", dtype=dtype):
            z = case.outputs(model, data)
        case.loss(z.float(), data).backward()
        opt.step()

    return loop


CASES = {
    "weights-mean": classes(plain),
    "weights-sum": classes(lambda z, data: F.cross_entropy(z, data[1], reduction="sum")),
    "weights-sum-of-tokens": tokens(total),
    "weights-mean-of-sequence-means": tokens(of_sequence_means),
    "weights-by-class": classes(by_class),
    "weights-by-row": classes(by_row),
    "weights-by-place": tokens(ranked),
    "weights-half": classes(lambda z, data: 0.5 * plain(z, data)),
    "weights-thousandth": classes(lambda z, data: 1e-3 * plain(z, data)),
    "weights-thousand": classes(lambda z, data: 1e3 * plain(z, data)),
    "weights-smoothing": classes(lambda z, data: F.cross_entropy(z, data[1], label_smoothing=0.2)),
    "weights-by-class-smoothing": classes(lambda z, data: by_class(z, data, label_smoothing=0.2)),
    "weights-soft-targets": classes(soft),
    "weights-soft-targets-sum": classes(lambda z, data: 13 * soft(z, data)),
    "weights-padded": tokens(lambda z, data: cross_entropy(z, data[1])),
    # accumulation
    "weights-accumulated": accumulating(4, 4),
    "weights-accumulated-without-division": accumulating(1, 1),
    "weights-accumulated-tokens": tokens(
        lambda z, data: cross_entropy(torch.cat(z), data[1]), outputs=in_parts, loop=of_all_tokens
    ),
    # what is in .grad is the gradient of the divided loss
    "weights-host-divides": accumulating(1, 4, divide(4)),
    "weights-host-divides-by-tokens": tokens(
        lambda z, data: cross_entropy(z, data[1]), loop=tokens_divided_later
    ),
    # clipping stays out of h, as in the paper
    "weights-clipped": classes(plain, loop=clipped),
    "weights-clipped-sum": classes(
        lambda z, data: F.cross_entropy(z, data[1], reduction="sum"), loop=clipped
    ),
    "weights-host-divides-and-clips": accumulating(1, 4, divide_and_clip),
    # loss scaling
    "weights-scaler": classes(plain, loop=scaled()),
    "weights-scaler-sum": classes(
        lambda z, data: F.cross_entropy(z, data[1], reduction="sum"), loop=scaled()
    ),
    "weights-scaler-rows-float16": classes(by_row, loop=scaled(torch.float16, 2.0**12), slack=0.05),
    # half precision
    "weights-rows-bfloat16": classes(by_row, loop=autocast(torch.bfloat16), slack=0.05),
    "weights-sequence-means-bfloat16": tokens(of_sequence_means, loop=autocast(torch.bfloat16), slack=0.05),
    "weights-sum-float16": tokens(total, loop=autocast(torch.float16), slack=0.05),
    # cut batches: the weights of the rows that were taken stand for all
    "weights-sum-cut": Case(
        classifier,
        lambda: rows(16),
        lambda z, data: F.cross_entropy(z, data[1], reduction="sum"),
        settings=DEFAULT,
        spread=2.6,
        draws=900,
    ),
    "weights-sequence-means-cut": Case(
        Words,
        lambda: sentences((6, 5, 4, 3, 2, 1, 1, 6, 5, 1, 2, 6, 1, 3, 2, 4)),
        of_sequence_means,
        settings=DEFAULT,
        spread=2.6,
        draws=900,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_h_is_the_curvature_of_the_weighted_loss(case):
    """M of one loss over h of another: gamma and the clipping mean something else in every such loop."""
    check_curvature(case)


# ---- ranks ----


def part_of_rank(z, y, every):
    """A rank's loss: its own mean (0 where all its tokens are padding), or its share of the whole batch's,
    times the two ranks by which DDP divides.
    """
    count = (every >= 0).sum() / 2 if every is not None else (y >= 0).sum().clamp(min=1)
    return cross_entropy(z, y, reduction="sum") / count


def on_ranks(draws, lengths, of_all):
    """DDP averages the ranks' losses: in a mean of means, a token of a rank with few weighs more."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Words()
    wrapped = DistributedDataParallel(model)
    opt = Sophia(wrapped, **{**ONE_STEP, "fraction": 1.0})
    ids, y = sentences(lengths)
    part = slice(0, 2) if rank == 0 else slice(2, 4)
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for _ in range(draws):
        part_of_rank(wrapped(ids[part]), y[part], y if of_all else None).backward()
        opt.step()
        opt.zero_grad()
        for name, p in model.named_parameters():
            sums[name] += opt.state[p]["hessian"]
    return {name: total / draws for name, total in sums.items()}


@pytest.mark.parametrize("lengths", [(6, 6, 1, 1), (4, 3, 0, 0)], ids=["uneven", "one-rank-all-padding"])
@pytest.mark.parametrize("of_all", [False, True], ids=["mean-of-rank-means", "mean-of-all-ranks"])
def test_weights_on_ranks(lengths, of_all):
    """Uneven ranks: every token weighs 1 / B in h, and something else in the gradient."""
    draws = 400
    found = teams.run(2, on_ranks, draws=draws, lengths=lengths, of_all=of_all)
    torch.manual_seed(0)
    exact = gauss_newton(
        Words(),
        sentences(lengths),
        lambda m, data: m(data[0]),
        lambda z, data: (
            sum(
                part_of_rank(z[rank], data[1][rank], data[1] if of_all else None)
                for rank in (slice(0, 2), slice(2, 4))
            )
            / 2
        ),
    )
    for of_rank in found:
        assert max(differences(of_rank, exact).values()) < SIGMAS * SPREAD / draws**0.5


# ---- trajectories ----


def trained(factor=1.0, scaler=False, rule="paper", host=1.0, steps=24):
    torch.manual_seed(0)
    model, data = classifier(), rows(16)
    opt = Sophia(model, lr=3e-2, update_every=3, gamma=0.5, weight_decay=0.0, rule=rule)
    scaling = torch.amp.GradScaler("cpu", enabled=scaler)
    for _ in range(steps):
        opt.zero_grad()
        scaling.scale(factor * plain(model(data[0]), data)).backward()
        scaling.unscale_(opt)
        divide(host)(model)
        scaling.step(opt)
        scaling.update()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("rule", ["paper", "damped"])
@pytest.mark.parametrize(
    "change",
    [{"factor": c} for c in (1e-3, 0.5, 256.0, 1e3)]
    + [{"scaler": True}, {"factor": 1e-3, "scaler": True}, {"factor": 8.0, "host": 8.0}],
    ids=lambda change: "-".join(f"{k}-{v}" for k, v in change.items()),
)
def test_weights_trajectory_does_not_know_the_scale(change, rule):
    """A loss times a constant trains otherwise, as it does not under AdamW."""
    start, one = trained(steps=0, rule=rule), trained(rule=rule)
    other = trained(**change, rule=rule)
    assert float((other - one).norm() / (one - start).norm()) < 1e-3
