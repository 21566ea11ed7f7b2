"""Model and training loss to look at: a user's function, or a small model of our own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sophia.refresh.model_outputs import find_loss

__all__ = ["Subject", "SubjectError", "example", "named", "subject_named"]


class SubjectError(Exception):
    """What was given cannot be examined; the text says what to write."""


@dataclass(frozen=True)
class Subject:
    """A model, and a function that runs one training forward and returns its loss."""

    model: nn.Module
    loss: Callable[[], Tensor]


def named(path: str) -> Any:
    """The object of ``module:name``, of an installed package or of the working folder."""
    module, colon, name = path.partition(":")
    if not (colon and module and name):
        raise SubjectError(
            f"{path!r} does not name a class or function. Write module:name, for instance sophia:Sophia"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind everything: a file there must not hide an installed package
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise SubjectError(
            f"{module!r} cannot be imported ({error}). Install it, or run where it can be found"
        ) from error
    except AttributeError as error:
        raise SubjectError(f"{module!r} has no {name!r}. Check the name") from error


def subject_named(path: str) -> Callable[[], Subject]:
    """A maker of subjects from ``module:function``, whose function returns ``(model, batch)`` or ``(model,
    loss_function)``.

    A mapping as batch is given to the model as keywords, a tuple or list as arguments; the loss is looked for
    in what the model returns. ``loss_function(model)`` runs the forward itself and returns the loss.
    """
    function = named(path)
    if not callable(function):
        raise SubjectError(f"{path!r} is a {type(function).__name__}, not a function without arguments")
    return lambda: _made(function(), path)


def _made(made: Any, path: str) -> Subject:
    if not isinstance(made, (tuple, list)) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise SubjectError(
            f"{path}() returned {_kind(made)}. Return a model and a batch, or a model and a function that "
            "takes the model and returns the loss"
        )
    model, how = made
    if callable(how) and not isinstance(how, Tensor):
        return Subject(model, lambda: _scalar(how(model), path))
    return Subject(model, lambda: _scalar(_loss_in(_called(model, how), path), path))


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss_in(output: Any, path: str) -> Any:
    loss = find_loss(output)
    if loss is None:
        raise SubjectError(
            f"the model of {path}() returned {_kind(output)} without a loss (no .loss, no ['loss'], no 0-dim "
            "tensor in a tuple). Return a function instead of the batch: it takes the model, runs it on the "
            "batch and returns the loss"
        )
    return loss


def _scalar(loss: Any, path: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise SubjectError(f"the loss of {path}() is {_kind(loss)}, not one number in a tensor")
    return loss


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return type(value).__name__


class ExampleModel(nn.Module):
    """Predicts the next token from a running mean of embeddings."""

    def __init__(self, tokens: int = 32, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(tokens, width), nn.Linear(width, width)
        self.head = nn.Linear(width, tokens)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        steps = torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        logits = self.head(torch.relu(self.hidden(self.embedding(ids).cumsum(1) / steps)))
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def example() -> Subject:
    """A language model of 4,000 parameters on a batch of counting sequences; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ExampleModel()
    ids = (torch.arange(8)[:, None] * 3 + torch.arange(17)) % 32
    return Subject(model, lambda: _loss_in(model(ids[:, :-1], labels=ids[:, 1:]), "example"))
