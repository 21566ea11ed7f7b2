"""The model that the benchmarks time: a plain GPT, sizes as arguments."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(d, 2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Returns logits ``(B, T, V)``; tied embedding and head."""

    def __init__(self, *, layers: int, width: int, heads: int, vocabulary: int, context: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


SIZES = {
    # name: layers, width, heads, vocabulary, batch, context
    "small": (4, 256, 4, 8192, 16, 256),
    "wide": (2, 512, 8, 16384, 2, 64),  # more parameters than activations
}


def make(size: str) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    """A model and one batch of ids and targets."""
    layers, width, heads, vocabulary, batch, context = SIZES[size]
    model = GPT(layers=layers, width=width, heads=heads, vocabulary=vocabulary, context=context)
    tokens = torch.randint(vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(1))
    return model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
