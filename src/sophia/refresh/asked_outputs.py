"""The outputs that the likelihood speaks of, found in what a model returned, or an error that says what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sophia.distributed.shards import is_dtensor
from sophia.likelihoods import Head
from sophia.refresh.model_outputs import find_logits, find_named
from sophia.refresh.places import names_in

__all__ = ["AskedOutputs"]


@dataclass(frozen=True)
class AskedOutputs:
    """How they are found: by name, by ``logits_fn``, or as logits are usually returned."""

    model: str
    """Its name, for errors."""
    heads: Sequence[Head]
    named: bool
    """Whether the heads have names that the output must have, too."""
    logits_fn: Callable[[Any], Any] | None

    def find(self, output: Any) -> tuple[Tensor, ...]:
        """The outputs that the likelihood speaks of, one for each head; RuntimeError if one is not there."""
        if self.logits_fn is not None:
            found = self.by_head(self.logits_fn(output), "logits_fn")
        elif self.named:
            found = tuple(find_named(output, head.name) for head in self.heads)
        else:
            found = (find_logits(output),)
        for head, tensor in zip(self.heads, found, strict=True):
            self._check(head, tensor, output)
        return found

    def by_head(self, value: Any, source: str) -> tuple[Any, ...]:
        if not self.named:
            return (value,)
        names = [head.name for head in self.heads]
        if not isinstance(value, Mapping) or set(names) - set(value):
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise RuntimeError(
                f"{source} returned {got}, but the likelihood has the heads {names}: return a mapping with "
                f"these names, for instance {{{names[0]!r}: output[0], ...}}"
            )
        return tuple(value[name] for name in names)

    def _check(self, head: Head, tensor: Any, output: Any) -> None:
        name = self.model
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what, example = (
                (f"the head {head.name!r}", f"a mapping with {head.name!r}")
                if self.named
                else ("logits", "the logits")
            )
            raise RuntimeError(
                f"cannot find {what} in the output of {name} ({type(output).__name__}){names_in(output)}; "
                f"pass logits_fn=, a function from the output to {example}, or use mode='manual'. (What a "
                "loss inside of a model is made of is found where that loss is returned, too.) A model whose "
                "outputs are compared with each other (embeddings) has none: there too it is mode='manual', "
                "or estimator='hutchinson'. Several fields with a loss each are likelihood=Heads({name: "
                "Categorical(), ...})"
            )
        if tensor is output and tensor.ndim == 0:
            raise RuntimeError(
                f"{name} returns its loss, one number, and labels cannot be drawn from that. Let it return "
                "the logits as well (a mapping or an object with logits, or a tuple), or use "
                "estimator='hutchinson', which needs the loss alone"
            )
        if is_dtensor(tensor):
            raise RuntimeError(
                f"the logits of {name} are a DTensor, split over tensor-parallel ranks: "
                "labels are drawn from whole rows. Give the output layer output_layouts=Replicate() and "
                "use_local_output=True"
            )
