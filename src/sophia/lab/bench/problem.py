"""What is trained while an optimizer is timed: a model, one batch, and where its loss is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophia.lab.bench.model import GPT
from sophia.lab.support.errors import UsageError
from sophia.lab.support.import_by_path import load_class
from sophia.refresh.model_outputs import find_logits, find_loss

__all__ = ["SHAPES", "Problem", "make"]

SHAPES: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "small": (4, 256, 4, 8192, 16, 256),
    "wide": (2, 512, 8, 16384, 2, 64),
    "tiny": (2, 32, 2, 512, 4, 32),
}
"""Built-in models: layers, width, heads, vocabulary, sequences, context. In "wide" parameters outweigh
activations; "tiny" takes a second and its ratios mean nothing.
"""


@dataclass
class Problem:
    """A model with the batch that it trains on."""

    model: nn.Module
    inputs: tuple[Any, ...] | Mapping[str, Any]
    loss_of: Callable[[Any], Tensor] | None = None

    def forward(self) -> Any:
        """Run the model on the batch."""
        if isinstance(self.inputs, Mapping):
            return self.model(**self.inputs)
        return self.model(*self.inputs)

    def loss(self) -> Tensor:
        """The training loss."""
        output = self.forward()
        found = find_loss(output) if self.loss_of is None else self.loss_of(output)
        if not isinstance(found, Tensor):
            raise UsageError(
                f"{type(self.model).__name__} returned {type(output).__name__} without a loss (no .loss, no "
                "['loss'], no 0-dim tensor in a tuple). Let your function return a third thing, a function "
                "from the output to the loss: return model, inputs, loss_of."
            )
        return found

    def logits(self) -> Tensor:
        """The logits, for optimizers whose users sample labels themselves."""
        found = find_logits(self.forward())
        if found is None:
            raise UsageError(
                f"no logits were found in the output of {type(self.model).__name__}: return them as .logits, "
                "['logits'], in a tuple, or alone."
            )
        return found


def make(subject: str, device: str = "cpu") -> Problem:
    """A built-in model by the name of its shape, or what the user's ``module:function`` makes.

    The function takes nothing and returns ``(model, inputs)`` or ``(model, inputs, loss_of)``: inputs are a
    tuple or a mapping to call the model with. It is called once for each optimizer and should make the same
    thing each time. Raises ``UsageError`` for anything else.

    >>> problem = make("tiny")
    >>> problem.loss().shape, problem.logits().shape
    (torch.Size([]), torch.Size([4, 32, 512]))
    """
    if ":" not in subject:
        if subject not in SHAPES:
            raise UsageError(
                f"There is no model {subject!r}. Choose from {', '.join(SHAPES)}, or give a function of "
                "your own as module:function."
            )
        layers, width, heads, vocabulary, batch, context = SHAPES[subject]
        model = GPT(layers=layers, width=width, heads=heads, vocabulary=vocabulary, context=context)
        ids = torch.randint(vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(1))
        return _placed(Problem(model, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())), device)
    made = load_class(subject)()
    if (
        not isinstance(made, tuple)
        or len(made) not in (2, 3)
        or not isinstance(made[0], nn.Module)
        or not isinstance(made[1], tuple | Mapping)
    ):
        raise UsageError(
            f"{subject} returned {type(made).__name__}: sophia bench needs what to train. Return "
            "(model, inputs) or (model, inputs, loss_of); inputs are a tuple or a mapping for the model."
        )
    return _placed(Problem(*made), device)


def _placed(problem: Problem, device: str) -> Problem:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    problem.model.to(device).train()
    if isinstance(problem.inputs, Mapping):
        problem.inputs = {name: moved(value) for name, value in problem.inputs.items()}
    else:
        problem.inputs = tuple(moved(value) for value in problem.inputs)
    return problem
