"""The output layer of a model that keeps its logits to itself, and the hidden states that go into it.

Fused losses (the whole of a linear layer and a cross-entropy in one function, in chunks, so that the logits
never exist) read the weight of that layer without calling it. The layer is looked for where models have one:
``get_output_embeddings()``, a linear layer, a table of embeddings that serves twice. Which of them it is, and
that nothing else lies between it and the loss, is shown by the gradient (``unseen.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sophia.distributed.shards import is_dtensor
from sophia.distributed.wrappers import unshard
from sophia.refresh.eager import eager
from sophia.refresh.model_outputs import tensors_in
from sophia.refresh.places import fields

__all__ = [
    "BeforeTheHead",
    "Catch",
    "Form",
    "HiddenStates",
    "OutputLayer",
    "may_be_found_later",
    "output_layers",
]

_MOST = 4  # layers that are tried
_TELLING = (
    0.2  # how far the nearest of so many directions is from a random one, roughly: well above any noise
)

Form = tuple[bool, int, int]
"""Whether a module returned a tensor, how many dimensions it has, and its width."""


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """From hidden states ``(..., d)`` to logits ``(..., V)``."""

    name: str
    """As it is written in an error."""
    module: nn.Module
    """The linear layer, or the table."""
    scale: float = 1.0
    cap: float | None = None
    """Logits are ``cap tanh(scale (W x + b) / cap)``; None for none."""
    in_lockstep: bool = False
    """Whether ranks have shards of it, and gather them while they run the model."""
    whole: tuple[Tensor, Tensor | None] | None = None
    """Weight and bias, where the module has but a shard of them."""

    @property
    def weight(self) -> Tensor:
        """``(V, d)``."""
        return self.module.weight if self.whole is None else self.whole[0]  # type: ignore[return-value]

    @property
    def is_sharded(self) -> bool:
        """Whether the module has, at this moment, but a shard of them."""
        return any(is_dtensor(p) for p in self.module.parameters(recurse=False))

    def gathered(self) -> OutputLayer:
        """The same with whole parameters. All ranks call it together."""
        if not self.is_sharded:
            return self
        weight, bias = (_whole(getattr(self.module, name, None)) for name in ("weight", "bias"))
        assert weight is not None
        return replace(self, whole=(weight, bias))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states, with their graph."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.module.weight.dtype)  # type: ignore[arg-type]
        if isinstance(self.module, nn.Embedding):
            raw = F.linear(hidden, self.weight)
        else:
            raw = self.module(hidden)
        return self._after(raw)

    def logits_and_slopes(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and their slopes in what the layer itself gives; None for 1."""
        bias = getattr(self.module, "bias", None) if self.whole is None else self.whole[1]
        weight = self.weight
        raw = F.linear(hidden.to(weight.dtype), weight, bias).float()
        if self.scale == 1.0 and self.cap is None:
            return raw, None
        logits = self._after(raw)
        slope = 1.0 if self.cap is None else 1 - (logits / self.cap).square()
        return logits, torch.as_tensor(self.scale * slope).expand_as(logits)

    def _after(self, raw: Tensor) -> Tensor:
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)


def _whole(parameter: Any) -> Tensor | None:
    return parameter.full_tensor().detach() if is_dtensor(parameter) else parameter  # type: ignore[no-any-return]


def output_layers(model: nn.Module, width: int) -> list[OutputLayer]:
    """Layers that may make logits of hidden states of that width, the most likely one first."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        layer = _named_by(module)
        if layer is not None and _fits(layer, width):
            found.setdefault(id(layer.weight), (_written(name, "get_output_embeddings()"), layer))
    adapted = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if _fits(module, width) and not name.startswith(adapted or ("\0",))
    ]
    linear = [each for each in reversed(modules) if isinstance(each[1], nn.Linear)]
    tables = [each for each in reversed(modules) if isinstance(each[1], nn.Embedding)]
    tables.sort(key=lambda each: -each[1].weight.shape[0])
    # Before the layers inside of the trunk, of which there are many: tables, of tokens and not of positions.
    for name, module in (*linear[:1], *tables, *linear[1:]):
        found.setdefault(id(module.weight), (_written("", name), module))
    return [
        OutputLayer(name, layer, scale, cap)
        for name, layer in list(found.values())[:_MOST]
        for scale, cap in _settings(model)
    ]


def _named_by(module: nn.Module) -> nn.Module | None:
    """The output layer that a module says to have."""
    named = getattr(module, "get_output_embeddings", None)
    layer = named() if callable(named) else None
    return layer if isinstance(layer, nn.Module) else None


def may_be_found_later(model: nn.Module, output: Any) -> bool:
    """Whether an output without logits may have come of an output layer: a loss was made of it inside the
    model, or the model says that it has such a layer.
    """
    if any(_named_by(module) is not None for module in model.modules()):
        return True
    return any(t.ndim == 0 and t.is_floating_point() and t.requires_grad for t in tensors_in(fields(output)))


def _written(*names: str) -> str:
    return ".".join(("model", *filter(None, names)))


def _fits(layer: nn.Module, width: int) -> bool:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or hasattr(layer, "base_layer"):
        return False  # not an adapter around a layer, whose weight is not what it multiplies by
    classes = weight.shape[0]
    # In few dimensions some row of many points nearly in the direction of any gradient: nothing is shown.
    return weight.shape[1] == width > 1 < classes and classes ** (-1 / (width - 1)) > _TELLING


def _settings(model: nn.Module) -> list[tuple[float, float | None]]:
    """What the configuration of a model says of the way from the layer to the logits, and nothing."""
    config = next((c for m in model.modules() if (c := getattr(m, "config", None)) is not None), None)

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, (int, float)) and value else None

    scales = [number(name) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    divisor = number("logits_scaling")
    scale = next((s for s in scales if s is not None), 1.0 if divisor is None else 1 / divisor)
    cap = number("final_logit_softcapping")
    return list(dict.fromkeys([(scale, cap), (1.0, None)]))


class HiddenStates:
    """The last tensor of each form that modules, and functions of torch, return, noted while forwards run.

    Args:
        wanted: the only form that is noted; None for all.
    """

    def __init__(self, wanted: Form | None = None) -> None:
        self._wanted = wanted
        self._last: dict[Form, Tensor] = {}
        self._makers: dict[Form, nn.Module] = {}

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Inside, forwards of the model are listened to."""
        self.forget()
        handles = [
            m.register_forward_hook(lambda module, _, out: self.note(out, module)) for m in model.modules()
        ]
        try:
            # Functions alone make what no module returns.
            with nullcontext() if self._wanted is not None and self._wanted[0] else _Results(self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, output: Any, maker: nn.Module | None) -> None:
        """Keep the first tensor of an output that may be of hidden states, and the module that made it."""
        tensor = _first_states(output)
        if tensor is None:
            return
        form = maker is not None, tensor.ndim, tensor.shape[-1]
        if self._wanted not in (None, form):
            return
        if maker is not None and self._last.get(form) is not tensor:  # the innermost of those that return it
            self._makers[form] = maker
        self._last.pop(form, None)
        self._last[form] = tensor

    def forget(self) -> None:
        """Let go of all tensors, which hold the graphs that they are of."""
        self._last.clear()
        self._makers.clear()

    def maker_of(self, form: Form) -> nn.Module | None:
        """The module that made the last one of that form; None for a function."""
        return self._makers.get(form)

    def of_form(self, form: Form) -> Tensor:
        """The last one of that form; KeyError if there was none."""
        return self._last[form]

    def forms(self) -> list[Form]:
        """Of all that were noted: those of modules first, and of most dimensions, which have not been shifted
        or flattened, and of these the latest.
        """
        return sorted(reversed(self._last), key=lambda form: (not form[0], -form[1]))


def _first_states(output: Any) -> Tensor | None:
    for tensor in tensors_in(fields(output)):
        if tensor.ndim >= 2 and tensor.grad_fn is not None and tensor.is_floating_point():
            return tensor
    return None


class Catch:
    """A hook that catches what one module returns in a training forward."""

    def __init__(self, module: nn.Module) -> None:
        self._tensor: Tensor | None = None
        self._handle = module.register_forward_hook(self._note)

    @untraced
    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._tensor = _first_states(output)

    def end(self) -> Tensor | None:
        """Take the hook off; what was caught, last."""
        self._handle.remove()
        return self._tensor


class _Results(TorchFunctionMode):
    """Notes what functions return: the last normalisation is often no module."""

    def __init__(self, states: HiddenStates) -> None:
        super().__init__()
        self._states = states

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple)):
            self._states.note(result, None)
        return result


@dataclass(frozen=True, eq=False)
class BeforeTheHead:
    """Predictions made of the last hidden states by the model's output layer."""

    model: nn.Module
    layer: OutputLayer
    form: Form
    """Of these states."""
    maker: nn.Module | None = None
    """The module that returns them, if one does."""
    states: HiddenStates = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", HiddenStates(self.form))

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Inside, a forward shows its hidden states: outside of compiled graphs."""
        with eager(), self.states.noted(self.model):
            yield

    def find(self, output: Any) -> tuple[Tensor, ...]:
        """The logits of the forward that has just run."""
        if self.layer.is_sharded:
            unshard(self.model, self.layer.module)
        return (self.layer.logits(self.states.of_form(self.form)),)
