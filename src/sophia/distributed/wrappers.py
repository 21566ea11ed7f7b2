"""How DDP, FSDP1 and FSDP2 scale gradients, and how to undo it.

What is not element-wise in Sophia is one sum, of the gradient on sampled labels over the ranks *before* it is
squared. Three kinds of parameters differ in who takes it:

    replicated       plain tensors (one process, DDP). Nobody: the pass runs the inner module, so the sum is
                     ours.
    fully sharded    ``fully_shard`` (FSDP2, a 1-D or 2-D mesh), ``FullyShardedDataParallel`` (FSDP1). The
                     wrapper, during the backward; it leaves the sum divided by a factor that is read here.
    tensor-parallel  other DTensors. Nobody across the tensor-parallel dimension, as its ranks see the same
                     data.

Wrappers are recognised by what they have, so that nothing is imported that the user did not import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sophia.distributed.shards import is_dtensor

__all__ = [
    "Wrapping",
    "full_shapes",
    "parameters_at_rest",
    "reducing",
    "reshard",
    "runs_a_method",
    "unshard",
    "unwrapped",
    "wrapping_of",
]


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module inside wrappers that pass the call on, which is the one to run again, and the process group
    of ``DistributedDataParallel``, None without.

    Raises:
        RuntimeError: a wrapper inside which a forward cannot be run again.
    """
    group = None
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if _is_fabric(model) or _is_fabric(compiled):
            # Its outputs accept fabric.backward() alone; and Fabric puts a compiled module outside of itself.
            fabric: Any = model if compiled is None else compiled
            model = fabric._forward_module
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            if getattr(model, "mixed_precision", None) is not None:
                raise RuntimeError(
                    "DistributedDataParallel(mixed_precision=...) frees its half-precision parameters "
                    "after the backward, so a forward cannot be run again. Use torch.autocast, or "
                    "fully_shard with a MixedPrecisionPolicy"
                )
            model, group = model.module, model.process_group
        elif isinstance(model, nn.DataParallel):
            model = model.module  # with several devices, the recorder refuses the copies that it makes
        elif any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__):
            engine: Any = model
            model = engine.module
        else:
            return model, group


def runs_a_method(model: nn.Module) -> bool:
    """Whether a call of ``model`` that begins now runs another of its methods in the place of its forward.

    Lightning and Fabric lead ``training_step`` through a wrapper (DDP) by a forward that they put there for
    one call.
    """
    forward = vars(model).get("forward")
    package = str(getattr(forward, "__module__", "")).partition(".")[0]
    return package in ("lightning", "pytorch_lightning", "lightning_fabric")


def _is_fabric(model: Any) -> bool:
    return isinstance(model, nn.Module) and {"_forward_module", "_original_module"} <= (
        model.__dict__.keys() | model._modules.keys()
    )


@dataclass(frozen=True)
class Wrapping:
    """What the wrappers inside a model say about its parameters."""

    multipliers: dict[int, float] = field(default_factory=dict)
    """By id of a parameter: what turns the gradient that its wrapper leaves in ``.grad`` into the sum over
    the ranks. A parameter that is missing here is summed by nobody.
    """
    groups: tuple[Any, ...] = ()
    """Process groups that the wrapper sums over; one after another they reach every rank that sees other
    data.
    """

    def lockstep(self) -> bool:
        """Whether forward and backward themselves wait for the other ranks."""
        return bool(self.multipliers)


def wrapping_of(model: nn.Module | None, parameters: Sequence[Tensor]) -> Wrapping:
    """Read the wrappers inside ``model``. The same on all ranks, errors included.

    Raises:
        RuntimeError: sharded parameters without a model to read the factor from, or a factor that cannot be
        read.
    """
    sharded = [p for p in parameters if is_dtensor(p) or getattr(p, "_fsdp_flattened", False)]
    if model is None:
        if sharded:
            raise RuntimeError(
                f"{len(sharded)} of {len(parameters)} parameters are sharded, but this optimizer knows no "
                "model: the factor by which their wrapper divides gradients, and with it h, cannot be read "
                "from the parameters alone. Pass the wrapped model too: Sophia(params, model=model, "
                "mode='manual'), or opt.attach(model)"
            )
        return Wrapping()
    multipliers: dict[int, float] = {}
    groups: dict[tuple[tuple[int, ...], ...], tuple[Any, ...]] = {}
    for unit in _units(model):
        multipliers.update(dict.fromkeys(map(id, unit.parameters), unit.multiplier))
        groups[tuple(tuple(_members(group)) for group in unit.groups)] = unit.groups
    if len(groups) > 1:
        raise RuntimeError(
            f"parts of {type(model).__name__} are sharded over different sets of ranks ({sorted(groups)}): "
            "then no one number of predictions belongs to the whole model, and a refresh would mix scales. "
            "Shard all parts over one mesh, or use one Sophia for each mesh with mode='manual'"
        )
    flat = [p for p in sharded if not is_dtensor(p) and id(p) not in multipliers]
    if flat:
        raise RuntimeError(
            f"{len(flat)} of {len(parameters)} parameters are flattened by FullyShardedDataParallel, but "
            f"{type(model).__name__} is not the wrapper that holds them. Build Sophia from the outermost "
            "wrapper, after wrapping"
        )
    return Wrapping(multipliers, next(iter(groups.values()), ()))


@dataclass(frozen=True)
class _Unit:
    """Parameters that one wrapper reduces together."""

    parameters: list[Tensor]
    multiplier: float
    groups: tuple[Any, ...]


def _units(model: nn.Module) -> Iterator[_Unit]:
    fsdp1 = _fsdp1_class()
    for module in model.modules():
        for group in _fsdp2_groups(module):
            yield _fsdp2_unit(group)
        if fsdp1 is not None and isinstance(module, fsdp1):
            yield from _fsdp1_units(module)


def _fsdp2_groups(module: nn.Module) -> list[Any]:
    """The parameter groups of a module that ``fully_shard`` (or ``replicate`` of the same family) was called
    on.
    """
    if not hasattr(module, "_get_fsdp_state"):
        return []
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    several = getattr(state, "_fsdp_param_groups", None)  # older versions of torch have one, or none
    return [
        group for group in ([state._fsdp_param_group] if several is None else several) if group is not None
    ]


def _fsdp2_unit(group: Any) -> _Unit:
    mesh = group.mesh_info
    names = ("replicate_process_group", "shard_process_group")
    over = tuple(getattr(mesh, name) for name in names if getattr(mesh, name, None) is not None)
    size = 1
    for process_group in over:
        size *= process_group.size()
    if getattr(group, "reduce_scatter_reduce_op", None) is not None:
        raise RuntimeError(
            "set_reduce_scatter_divide_factor() was called on the model, and this version of torch hides "
            "the factor inside the operation: the curvature would be off by its square. Call "
            "set_gradient_divide_factor() of a newer torch, or divide the loss instead"
        )
    factor = getattr(group, "gradient_divide_factor", None)
    parameters = [parameter.sharded_param for parameter in group.fsdp_params]
    return _Unit(parameters, float(size if factor is None else factor), over)


def _fsdp1_class() -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)


def _fsdp1_units(module: Any) -> Iterator[_Unit]:
    handle = module._handle
    if handle is None:
        return
    if module._comm_hook is not None or module._fsdp_extension is not None:
        what = "a communication hook" if module._comm_hook is not None else "a tensor-parallel extension"
        raise RuntimeError(
            f"FullyShardedDataParallel has {what}, which may scale or change the gradients: the sum over "
            "the ranks cannot be read back from them. Take it off, or use fully_shard"
        )
    inter = getattr(module, "_inter_node_pg", None)
    flat = handle.flat_param
    yield _Unit(
        [flat, *(getattr(flat, "_params", None) or ())],
        float(module._gradient_predivide_factor * module._gradient_postdivide_factor),
        (module.process_group,) if inter is None else (inter, module.process_group),
    )


def full_shapes(model: nn.Module) -> dict[int, Sequence[int]]:
    """By id: shape of the whole parameter, for wrappers that show a flattened part of it (FSDP1).

    Raises:
        ValueError: the parameters of several layers are one flat vector, so their dimensions are lost.
    """
    fsdp1 = _fsdp1_class()
    known: dict[int, Sequence[int]] = {}
    for module in model.modules() if fsdp1 is not None else ():
        if not isinstance(module, fsdp1) or module._handle is None:
            continue
        flat = module._handle.flat_param
        if getattr(flat, "_params", None) is None:
            raise ValueError(
                "Sophia(model): FullyShardedDataParallel with use_orig_params=False shows the parameters "
                "of several layers as one flat vector, so matrices, which are decayed, cannot be told from "
                "vectors, which are not. Wrap with use_orig_params=True (or use fully_shard), or pass "
                "parameter groups of your own with model="
            )
        known.update((id(p), shape) for p, shape in zip(flat._params, flat._shapes, strict=True))
    return known


@contextmanager
def reducing(model: nn.Module | None) -> Iterator[None]:
    """Inside, every backward through ``fully_shard`` reduces its gradients, whatever accumulation is set to.

    Raises:
        RuntimeError: gradients of the user's micro-batches still wait to be reduced; the pass would take them
            for its own.
    """
    groups = [] if model is None else [group for module in model.modules() for group in _fsdp2_groups(module)]
    for group in groups:
        if getattr(group, "_partial_reduce_output", None) is not None or any(map(_waits, group.fsdp_params)):
            raise RuntimeError(
                "a Hessian pass begins while gradients of earlier micro-batches are still unreduced "
                "(set_requires_gradient_sync(False)): they would enter h. Set it to True before the last "
                "backward of a step, and run hessian_pass() before the first or after the last one"
            )
    names = ("reduce_grads", "all_reduce_grads")
    saved = [[getattr(group, name) for name in names] for group in groups]
    try:
        for group in groups:
            for name in names:
                setattr(group, name, True)
        yield
    finally:
        for group, values in zip(groups, saved, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(group, name, value)


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward without a backward leaves with ``fully_shard``.

    The next forward would use them: it would not see what was written into the shards meanwhile, and its
    rounding would tell whether there had been such a forward.
    """
    for module in model.modules():
        if _fsdp2_groups(module):
            cast("Any", module).reshard()


def unshard(model: nn.Module, layer: nn.Module) -> None:
    """Make the parameters of a layer whole, for a use outside of the forwards of ``model``, unless the layer
    is sharded by itself and does so when it is called. All ranks call it together.
    """
    own = {id(parameter) for parameter in layer.parameters(recurse=False)}
    for module in model.modules():
        held = (parameter for group in _fsdp2_groups(module) for parameter in group.fsdp_params)
        if any(id(parameter.sharded_param) in own for parameter in held):
            if module is not layer or isinstance(layer, nn.Embedding):
                cast("Any", module).unshard()
            return


def parameters_at_rest(model: nn.Module) -> list[Tensor]:
    """A model's parameters as an optimizer holds them, inside of a forward too: there ``fully_shard`` shows
    others in the place of its shards.
    """
    shards: dict[int, Tensor] = {}
    for module in model.modules():
        for group in _fsdp2_groups(module):
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                shards[id(parameter.sharded_param if whole is None else whole)] = parameter.sharded_param
    return [shards.get(id(parameter), parameter) for parameter in model.parameters()]


def _waits(parameter: Any) -> bool:
    whole = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None)


def _members(group: Any) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)
