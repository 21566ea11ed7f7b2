"""The model that the benchmarks time: that of ``sophia bench``, returning logits alone; and its sizes."""

import torch

from sophia.lab.bench import model as gpt


class GPT(gpt.GPT):
    """Returns logits ``(B, T, V)``; tied embedding and head."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(ids)


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
