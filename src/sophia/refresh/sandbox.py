"""Sandbox of a Hessian pass: gradients, buffers, generators and modes are as before afterwards.

Inside, the ``.grad`` of every parameter of the model is free, another optimizer's too, gradients are on and
dropout has its own noise. Afterwards ``.grad`` (the very same tensors), all buffers (BatchNorm statistics
among them), frozen parameters and attributes that a forward moves, and the global random generators of torch,
Python and NumPy are bit for bit as before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sophia.refresh.moved_state import State
from sophia.refresh.noise import Noise, cuda_devices

__all__ = ["in_sandbox", "sandbox"]

_depth = 0


def in_sandbox() -> bool:
    """Whether a Hessian pass is running: its forwards are nobody's training forwards."""
    return _depth > 0


@contextmanager
def sandbox(
    model: nn.Module | None,
    parameters: Sequence[Tensor],
    *,
    seed: int,
    copies: bool = False,
    tensor_hooks: bool = False,
    moving: Collection[int] = (),
) -> Iterator[None]:
    """Protect the training state; inside, torch's generators are seeded with ``seed``.

    Args:
        model: whose buffers and parameters are protected, those of another optimizer too.
        parameters: more of them.
        seed: of the noise inside.
        copies: somebody may write into the memory of the training gradients during the pass (the buckets of
            ``DistributedDataParallel``), so that setting them aside is not enough.
        tensor_hooks: whether hooks on the parameters (``p.register_hook``) run inside. They belong to the
            training gradient: a recorder would be shown sampled ones, and what a hook makes of a gradient is
            not the curvature of the loss.
        moving: modules, by id, that are known to move state in a forward.
    """
    # All of the model's: the pass goes through those of another optimizer too, and would add to their .grad.
    everyone = {id(p): p for p in (*parameters, *(() if model is None else model.parameters()))}
    parameters = list(everyone.values())
    for parameter in parameters:
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} has a post-accumulate-grad hook (an "
                "optimizer in the backward?). It would fire during the Hessian pass and take the sampled "
                "gradient for the training gradient. Remove the hook, and call step() after the backward"
            )
    saved = [parameter.grad for parameter in parameters]
    contents = [gradient.clone() if copies and gradient is not None else None for gradient in saved]
    state = State(model, moving=moving)
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    cuda = cuda_devices(parameters)
    noise = Noise(cuda)
    global _depth
    hooks = [] if tensor_hooks else [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooks:
        parameter._backward_hooks = None
    for parameter in parameters:
        parameter.grad = None
    _depth += 1
    try:
        with torch.enable_grad():
            # Not torch.manual_seed: it would also seed devices that are not restored.
            torch.default_generator.manual_seed(seed)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            yield
    finally:
        _depth -= 1
        noise.restore()
        for parameter, listening in hooks:
            parameter._backward_hooks = listening
        for parameter, gradient, content in zip(parameters, saved, contents, strict=True):
            parameter.grad = gradient
            if gradient is not None and content is not None:
                with torch.no_grad():
                    gradient.copy_(content)
        for module, training in modes:
            module.training = training
        state.restore()
