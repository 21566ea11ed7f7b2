"""Models and training losses that the doctor is shown: a function each, as a user would write it."""

import torch
from torch import nn
from torch.nn import functional as F


def rows(n=16, classes=5):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g), torch.randint(0, classes, (n,), generator=g)


def classifier(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *more, nn.Tanh(), nn.Linear(8, 5))


def plain():
    x, y = rows()
    return classifier(), lambda model: F.cross_entropy(model(x), y)


def summed():
    x, y = rows()
    return classifier(), lambda model: F.cross_entropy(model(x), y, reduction="sum")


def weighted():
    x, y = rows()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    return classifier(), lambda model: F.cross_entropy(model(x), y, weight)


def half():
    x, y = rows()
    return classifier(), lambda model: 0.5 * F.cross_entropy(model(x), y)


def tempered():
    x, y = rows()
    return classifier(), lambda model: F.cross_entropy(model(x) / 2, y)


def numbers():
    x, _ = rows()
    return classifier(), lambda model: F.mse_loss(model(x), x[:, :1].expand(-1, 5))


def batch_norm():
    x, y = rows()
    return classifier(nn.BatchNorm1d(8)), lambda model: F.cross_entropy(model(x), y)


def two_batches():
    x, y = rows()
    return classifier(), lambda model: sum(F.cross_entropy(model(x[i::2]), y[i::2]) / 2 for i in range(2))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lstm, self.head = nn.Embedding(9, 8), nn.LSTM(8, 8), nn.Linear(8, 9)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])


def time_first():
    ids = torch.arange(6 * 16).reshape(6, 16) * 5 % 9
    return TimeFirst(), lambda model: F.cross_entropy(model(ids).flatten(0, 1), (ids.flatten() + 1) % 9)


class Packed(nn.Module):
    """Attention within the documents of a row, told by positions that start anew."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, input_ids, position_ids):
        x = self.embedding(input_ids)
        document = (position_ids == 0).cumsum(1)
        mask = (document[:, :, None] == document[:, None]).tril()
        return self.head(F.scaled_dot_product_attention(x, x, x, attn_mask=mask))


def packed():
    positions = torch.cat([torch.arange(n) for n in (5, 3, 7, 4, 5, 6, 2, 4)])[None]
    ids = torch.arange(positions.shape[1])[None] * 5 % 9
    labels = ((ids + 1) % 9).flatten()
    return Packed(), lambda model: F.cross_entropy(model(ids, position_ids=positions).flatten(0, 1), labels)


def one_row():
    """The same without documents: nothing can be left out."""
    model, ids = Packed(), torch.arange(36)[None] * 5 % 9
    labels, positions = ((ids + 1) % 9).flatten(), torch.arange(36)[None]
    return model, lambda model: F.cross_entropy(model(ids, position_ids=positions).flatten(0, 1), labels)


class Chunked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, ids):
        return [self.head(part) for part in self.embedding(ids).chunk(3, 1)]


def chunks():
    ids = torch.arange(8 * 6).reshape(8, 6) * 5 % 9
    labels = (ids + 1) % 9
    return Chunked(), lambda model: F.cross_entropy(torch.cat(model(ids), 1).flatten(0, 1), labels.flatten())


class TwoKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.value = classifier(), nn.Linear(4, 1)

    def forward(self, x):
        return {"logits": self.net(x), "value": self.value(x)}


def two_kinds():
    x, y = rows()

    def loss(model):
        found = model(x)
        return F.cross_entropy(found["logits"], y) + (found["value"] - x[:, :1]).square().mean()

    return TwoKinds(), loss


CALLS = [0]


class Counter(nn.Module):
    """Depends on something that no module holds."""

    def __init__(self):
        super().__init__()
        self.net = classifier()

    def forward(self, x):
        CALLS[0] += 1
        return self.net(x) * (1 + 0.5 * (CALLS[0] % 3))


def counting():
    x, y = rows()
    return Counter(), lambda model: F.cross_entropy(model(x), y)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.more = classifier(), classifier()

    def forward(self, x):
        return {"logits": self.net(x), "more": self.more(x)}


def two_heads():
    x, y = rows()

    def loss(model):
        found = model(x)
        return F.cross_entropy(found["logits"], y) + 0.4 * F.cross_entropy(found["more"], y)

    return Heads(), loss


def clipped():
    """The gradient is shortened between the backward and the step, by a hook that runs last."""
    x, y = rows()

    def loss(model):
        found = F.cross_entropy(model(x), y)

        def shorten():
            for p in model.parameters():
                p.grad.mul_(0.25)

        def at_the_end(_):
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(lambda: queue(shorten)))

        found.register_hook(at_the_end)
        return found

    return classifier(), loss


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ids = torch.arange(8 * 12).reshape(8, 12) * 5 % 31
    labels = ids.clone()
    labels[:, :3] = -100
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": labels}
