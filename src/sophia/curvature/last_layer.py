"""The linear layer whose outputs are the logits, where a model shows it: a shorter backward for a sparse
gradient.

A gradient in the logits that is zero in all but a few classes (``Contrast`` in ``likelihoods.sampling``)
needs a few rows of the last layer's weight: for labels a, b and the layer's input x,

    z_a - z_b  =  x . (W_a - W_b) + bias_a - bias_b .

Backward through the right-hand side costs (predictions x width) where backward through the dense logits costs
twice (predictions x classes x width), a quarter of a whole small GPT, and gives the same gradients. It is
taken where a plain ``nn.Linear`` returned the very tensor that the model handed out as its logits; anywhere
else (a scaled, cast, compiled, sharded, quantised or adapted head) the dense way serves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_globals

from sophia.distributed.shards import is_dtensor
from sophia.likelihoods.sampling import Contrast

__all__ = ["Readout", "watched"]


@dataclass(frozen=True)
class Readout:
    """One call of a linear layer. It does not keep the outputs, the largest tensor of a language model."""

    layer: nn.Linear
    inputs: Tensor

    def loss(self, contrast: Contrast) -> Tensor:
        """A scalar whose gradients are those that ``contrast`` as a gradient in the outputs gives."""
        x = self.inputs.reshape(-1, self.inputs.shape[-1])
        if contrast.rows is not None:
            x = x[contrast.rows]
        wide, values = contrast.values.dtype, contrast.values
        # Half precision is left before anything is added up, as a matrix product would do inside.
        direction = F.embedding_bag(
            contrast.labels, self.layer.weight.to(wide), mode="sum", per_sample_weights=values
        )
        loss = (x.to(wide) * direction).sum()
        if self.layer.bias is not None:
            loss = loss + (self.layer.bias.to(wide)[contrast.labels] * values).sum()
        return loss


@contextmanager
def watched(model: nn.Module, classes: Collection[int]) -> Iterator[list[tuple[Tensor, Readout]]]:
    """Inside, a forward of ``model`` adds the outputs and the call of each layer that may have made logits
    over so many classes to the list.
    """
    calls: list[tuple[Tensor, Readout]] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        assert isinstance(layer, nn.Linear)
        # Without a graph here (reentrant checkpointing runs the layer twice) this is not the call to keep.
        if len(inputs) == 1 and outputs.requires_grad:
            calls.append((outputs, Readout(layer, inputs[0])))

    handles = [layer.register_forward_hook(note) for layer in _candidates(model, classes)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _candidates(model: nn.Module, classes: Collection[int]) -> list[nn.Linear]:
    """Layers that are what they seem: nothing between their inputs, weight and outputs, and no compiled graph
    around them, which a hook would break.
    """
    if module_globals._global_forward_hooks or module_globals._global_backward_hooks:
        return []
    named = dict(model.named_modules())
    # fully_shard leaves whole weights on its root after a forward (a proof's), and reduces what comes through
    # the outputs alone.
    if any(hasattr(module, "_get_fsdp_state") for module in named.values()):
        return []
    compiled = [name for name, module in named.items() if _is_compiled(module)]
    return [
        module
        for name, module in named.items()
        if type(module) is nn.Linear
        and module.out_features in classes
        and _is_plain(module)
        and not any(above == "" or name == above or name.startswith(above + ".") for above in compiled)
    ]


def _is_plain(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        type(weight) is nn.Parameter
        and weight.shape == (layer.out_features, layer.in_features)
        and weight.layout == torch.strided
        and not is_dtensor(weight)
        and not getattr(weight, "_fsdp_flattened", False)
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )


def _is_compiled(module: nn.Module) -> bool:
    return (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules  # what torch.compile(module) returns
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )
