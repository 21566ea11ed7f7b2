"""Conditions of a recorded forward, under which it can be run again as what it was.

Its parameters and their versions are always kept: other tensors may have stood in their place
(``torch.func.functional_call``), or they may have been written to since. So are the modes of its modules, and
the state that it has moved (``moved_state.py``), as it was before, where the model is known to move any. The
first forward of each kind of input is looked at more closely: with the random generators and some of its
outputs, ``proof.py`` shows that running it again gives the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sophia.distributed.shards import is_dtensor, local
from sophia.distributed.wrappers import parameters_at_rest
from sophia.refresh.moved_state import State
from sophia.refresh.noise import Noise, cuda_devices

__all__ = ["Conditions", "Witness", "Witnesses", "sampled"]

_TENSORS, _ENTRIES, _OUTPUTS, _OF_OUTPUTS = 8, 8, 16, 256


@dataclass(eq=False)
class Witness:
    """What proves a repetition."""

    form: Hashable
    """The kind of input, for which one proof holds."""
    noise: Noise
    """The random generators before the forward."""
    outputs: list[tuple[torch.Size, Tensor]]
    """Shapes and entries of what it returned."""


@dataclass(eq=False)
class Conditions:
    """What a forward was run with, beside its arguments."""

    versions: dict[int, int]
    """Of the parameters at its end, by id."""
    weights: dict[int, Tensor]
    """Entries of some parameters at its beginning, by id; of all for a witness, as writes through ``.data``
    leave the versions as they are.
    """
    evaluated: frozenset[int]
    """Modules, by id, that were in evaluation mode."""
    began: State | None
    """The state that it has moved, as it was before."""
    witness: Witness | None = None

    def begin_again(self, model: nn.Module) -> None:
        """Put modes, and the state that the forward has moved, to what they were before it."""
        for module in model.modules():
            if module.training is (id(module) in self.evaluated):
                module.training = not module.training
        if self.began is not None:
            self.began.restore()

    def strangers(self, model: nn.Module) -> int:
        """How many parameters of the model took no part, as other tensors stood in their place."""
        return sum(id(p) not in self.versions for p in model.parameters() if not _is_sharded(p))

    def written(self, parameters: Sequence[Tensor]) -> int:
        """How many of the parameters have been written to since."""
        number = sum(
            self.versions.get(id(p), p._version) != p._version for p in parameters if not _is_sharded(p)
        )
        # The same values may have been written (a learning rate of zero).
        return number if number and not self.same_weights(parameters, least=1) else 0

    def same_weights(self, parameters: Iterable[Tensor], *, least: int = 0) -> bool:
        """Whether the entries that were kept of these parameters, of so many at least, are what they were."""
        pairs = [(p, self.weights[id(p)]) for p in parameters if id(p) in self.weights]
        return len(pairs) >= least and all(torch.equal(_some(p), then) for p, then in pairs)


class Witnesses:
    """Notes the conditions of the recorded forwards of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = parameters_at_rest(model)
        # FSDP1 moves the memory of its parameters about: nothing can be told of them.
        self._can_prove = not any(getattr(p, "_fsdp_flattened", False) for p in self._parameters)
        self.proved: dict[Hashable, str | None] = {}
        """Kinds of input whose forwards need no witness any more, and what was different in a repetition;
        None if nothing was.
        """
        self.moving: set[int] = set()
        """Modules, by id, that were seen to move state."""

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Noted:
        """What can only be noted before the forward; for ``after``."""
        form, witness, state = (model.training, _form((args, dict(kwargs)))), None, None
        evaluated = frozenset(id(module) for module in model.modules() if not module.training)
        if form not in self.proved and self._can_prove:
            witness = Witness(form, Noise(cuda_devices(self._parameters)), [])
            state = State(model, moving=self.moving, light=True)
        elif self.moving:
            state = State(model, moving=self.moving, only=self.moving, light=True)
        step = 1 if witness is not None else max(1, len(self._parameters) // _TENSORS)
        # Frozen ones are state, which may move.
        kept = [p for p in self._parameters if p.requires_grad][::step] if self._can_prove else []
        weights = {id(p): _some(p) for p in kept}
        versions = {} if state is None else {id(p): p._version for p in model.parameters() if p.requires_grad}
        return _Noted(evaluated, weights, state, versions, witness)

    def after(self, model: nn.Module, noted: _Noted, outputs: Iterable[Tensor]) -> Conditions:
        """The conditions of a forward that has ended."""
        versions = {id(p): p._version for p in model.parameters()}
        began = None
        if noted.state is not None:
            began, modules = noted.state.moved()
            self.moving |= modules
            # A forward that sets its own weights (from its first batch, say) is not taken back to before.
            if any(versions.get(number, version) != version for number, version in noted.versions.items()):
                began = None
        witness = noted.witness
        if witness is not None and began is not None and not began.complete:
            witness = None  # the next one of this kind will be
        if witness is not None:
            witness.outputs = sampled(outputs)
        return Conditions(versions, noted.weights, noted.evaluated, began, witness)

    def unproved(self, conditions: Conditions) -> str:
        """Why there is no proof for a forward of a kind of which none was proved."""
        if not self._can_prove:
            return "a wrapper moves the memory of the parameters about"
        if conditions.witness is None:
            return "the state that it moves could not be kept whole"
        return "its parameters have changed since, so that a difference would tell nothing"

    def same_weights(self, conditions: Conditions) -> bool:
        """Whether all parameters are what they were in a forward, as far as its witness can tell."""
        return not conditions.written(self._parameters) and conditions.same_weights(self._parameters)


@dataclass(eq=False)
class _Noted:
    """What is known before a forward."""

    evaluated: frozenset[int]
    weights: dict[int, Tensor]
    state: State | None
    versions: dict[int, int]
    witness: Witness | None


def _some(parameter: Tensor) -> Tensor:
    some = entries(local(parameter), _ENTRIES)
    # Weights that are kept in eight bits (torchao) have an arithmetic, whose results are ordinary tensors,
    # but cannot be compared with each other.
    return some if type(some) is Tensor else some * 1.0


def sampled(outputs: Iterable[Tensor]) -> list[tuple[torch.Size, Tensor]]:
    """Shapes and some entries of the first of them, of those that hold real numbers."""
    numbers = (t for t in outputs if t.is_floating_point() and not is_dtensor(t))
    return [(t.shape, entries(t, _OF_OUTPUTS)) for t in islice(numbers, _OUTPUTS)]


def entries(tensor: Tensor, number: int) -> Tensor:
    """A copy of some entries, at even distances."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // number)][:number].clone()


def _is_sharded(parameter: Tensor) -> bool:
    return is_dtensor(parameter) or bool(getattr(parameter, "_fsdp_flattened", False))


def _form(value: Any) -> Hashable:
    """Of each tensor dtype and number of dimensions, by its place."""
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    if isinstance(value, Mapping):
        return tuple((name, _form(item)) for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_form, value))
    return str(type(value))
