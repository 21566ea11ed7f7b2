"""Second moments of a layer's inputs and of the gradients of its outputs, read from the passes of a training.

Of the last micro-batch before a step alone: all of them would cost a layer of 96 x 384 two thirds of its own
forward and backward. With ``drawn`` the backward is another one, of labels that the model itself predicts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sophia.refresh.seeds import seed_for

__all__ = ["Passes"]


class Passes:
    """Hooks on the layers of some matrices.

    Args:
        model: gives ``.logits`` for ``model(input_ids=..., labels=...)``.
        matrices: weights of ``nn.Linear`` (out, in) or of GPT-2's ``Conv1D`` (in, out).
        seed: of the labels that are drawn.
        drawn: draw labels, in place of those of the training.
    """

    def __init__(self, model: nn.Module, matrices: list[Tensor], seed: int, *, drawn: bool) -> None:
        self.model, self.seed, self.drawn = model, seed, drawn
        wanted = {id(p) for p in matrices}
        self.layers = {id(m.weight): m for m in model.modules() if id(getattr(m, "weight", None)) in wanted}
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.batch: Tensor | None = None
        self.busy = False

    def watch(self) -> None:
        """Put the hooks on."""
        for key, layer in self.layers.items():
            layer.register_forward_hook(lambda module, args, out, key=key: self._after(key, args[0], out))
        self.model.register_forward_pre_hook(self._before, with_kwargs=True)

    def inputs_along(self, matrix: Tensor) -> int:
        """The dimension of a matrix along which its layer's inputs are."""
        return 1 if isinstance(self.layers[id(matrix)], nn.Linear) else 0

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.batch = kwargs["input_ids"]
            self.autocast = torch.is_autocast_enabled("cpu")

    def _after(self, key: int, x: Tensor, y: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        self.inputs[key] = x.detach()
        if self.busy:
            self.outputs[key] = y
        elif not self.drawn:
            y.register_hook(lambda d: self.gradients.__setitem__(key, d))

    def moments(self, step: int) -> dict[int, tuple[Tensor, Tensor]]:
        """For each matrix, in its own layout: the mean of x x' of its rows, and of d d' of its columns (the
        other way about for ``nn.Linear``), up to a factor.
        """
        if self.drawn:
            self._draw(step)
        found = {}
        for key, layer in self.layers.items():
            x, d = (t.flatten(0, -2).float() for t in (self.inputs[key], self.gradients[key]))
            pair = (x.T @ x / len(x), d.T @ d * len(d))
            found[key] = pair if isinstance(layer, nn.Linear) is False else pair[::-1]
        return found

    @torch.enable_grad()
    def _draw(self, step: int) -> None:
        assert self.batch is not None
        self.busy = True
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(input_ids=self.batch).logits[:, :-1].flatten(0, 1).float()
        self.busy = False
        generator = torch.Generator().manual_seed(seed_for("study", self.seed, step))
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
        loss = nn.functional.cross_entropy(logits, labels)
        keys = list(self.outputs)
        drawn = torch.autograd.grad(loss, [self.outputs[key] for key in keys])
        self.gradients = dict(zip(keys, drawn, strict=True))
        self.outputs.clear()
