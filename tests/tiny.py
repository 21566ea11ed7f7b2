"""Small models, data and label rules that the tests share."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from sophia.likelihoods import Categorical

V, T, D = 61, 16, 32


class Block(nn.Module):
    """A transformer block with torch's fused attention."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (z.view(b, t, 4, D // 4).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, D))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Two blocks; returns (logits, loss) with targets, (logits, None) without. Padding is -1."""

    def __init__(self, *, dropout=0.0, checkpoint=None, tied=True, layers=2):
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.checkpoint = checkpoint
        nn.init.normal_(self.tokens.weight, std=0.3)
        nn.init.normal_(self.positions.weight, std=0.1)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids, targets=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            if self.checkpoint is None:
                x = block(x)
            else:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.checkpoint == "reentrant")
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, V), targets.reshape(-1), ignore_index=-1)


class Bare(GPT):
    """The same model returning logits alone: the loss is the loop's business."""

    def forward(self, ids):
        return super().forward(ids)[0]


def data(n=16, *, padded=False, seed=0):
    """Token ids and targets ``(n, T)``; with padding, targets are -1 after a random length."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (n, T + 1), generator=g)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if padded:
        length = torch.randint(4, T + 1, (n,), generator=g)
        y = y.masked_fill(torch.arange(T)[None] >= length[:, None], -1)
    return x, y


class LabelsFromLogits(Categorical):
    """A pair of labels that is a function of the logits of their own prediction.

    They do not depend on how the batch is cut into micro-batches, rows or ranks, so layouts can be compared
    exactly.
    """

    def __init__(self):
        super().__init__(pairs=1)

    def draw(self, probabilities, uniforms):
        order = probabilities.argsort(-1, descending=True)
        likely = min(7, order.size(-1))
        first = order[:, :1] % likely
        return order.gather(-1, torch.cat([first, (first + 3) % likely], 1))


class ForcedLabels(Categorical):
    """Hands out given labels, in order of the predictions: ``(n,)`` one each, ``(n, 2)`` pairs."""

    def __init__(self, labels):
        super().__init__(pairs=labels.ndim - 1)
        self.labels, self.used = labels, 0

    def draw(self, probabilities, uniforms):
        self.used += len(probabilities)
        return self.labels[self.used - len(probabilities) : self.used]


def weights_in_means(mask, sizes):
    """What each prediction weighs in the sum of the mean losses of micro-batches of ``sizes`` rows."""
    return torch.cat([part / part.sum() for part in mask.double().split(sizes)])


def oracle(model, x, mask, logits_of=lambda model, x: model(x)[0], likelihood=None, weights=None):
    """``B * (gradient of the mean cross-entropy on the chosen labels)^2`` of the whole batch at once, or of
    the difference between two labels, divided by sqrt(2); (by parameter, B).

    With ``weights``, one a counted prediction: the square of the gradient of their roots times the losses.
    """
    likelihood = LabelsFromLogits() if likelihood is None else likelihood
    parameters = [p for p in model.parameters() if p.requires_grad]
    # autograd.grad cannot go through reentrant checkpointing
    checkpoint, model.checkpoint = getattr(model, "checkpoint", None), None
    logits = logits_of(model, x)[mask].float()
    labels = likelihood.draw(torch.softmax(logits.detach(), -1), None)
    count = int(mask.sum())
    if likelihood.pairs:
        assert labels.shape[1] == 2
        first, second = (F.cross_entropy(logits, labels[:, i], reduction="none") for i in (0, 1))
        losses = (first - second) / 2**0.5
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    roots = torch.full((count,), count**-0.5) if weights is None else weights.sqrt()
    loss = (losses * roots).sum()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    model.checkpoint = checkpoint
    return {
        p: torch.zeros_like(p) if g is None else g * g for p, g in zip(parameters, gradients, strict=True)
    }, count


def estimate_in_state(optimizer):
    """What the last refresh estimated, from h after exactly one refresh."""
    return {
        p: optimizer.state[p]["hessian"] / (1 - group["betas"][1])
        for group in optimizer.param_groups
        for p in group["params"]
        if "hessian" in optimizer.state.get(p, ())
    }


def relative_error(found, expected):
    """Norm of the difference over the norm of the expected, over all parameters together."""
    difference = sum(float((found[p].float() - e.float()).square().sum()) for p, e in expected.items())
    return (difference / sum(float(e.float().square().sum()) for e in expected.values())) ** 0.5


def trained(model, opt, steps=4):
    """The parameters of a ``GPT`` after so many steps of an ordinary loop."""
    x, y = data()
    for _ in range(steps):
        opt.zero_grad()
        model(x, y)[1].backward()
        opt.step()
    return [p.detach().clone() for p in model.parameters()]
