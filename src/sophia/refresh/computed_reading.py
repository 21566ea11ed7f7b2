"""Reading of logits that ``logits_fn`` computes, once a backward has come through what they are made of.

Before the next forward, or at the step: the graph that is kept for it is as large as the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia.refresh.listeners import OfOutput, Reader
from sophia.refresh.recording import Recording

__all__ = ["read_computed"]


def read_computed(reader: Reader, recording: Recording) -> None:
    """Read what counts, and weighs, from what has arrived in the outputs that the logits are made of."""
    computed = recording.computed
    if computed is None:
        return
    parts = [part for part in recording.outputs if part.place is None]
    if computed.late:  # after a backward that was read: what both weigh together is not known
        for part in parts:
            part.unread = True
    if all(gradient is None for gradient in computed.arrived):
        return
    with torch.enable_grad():
        found = computed.gradients()
        factor = None if found is not None else computed.factor_of_contrast([part.head for part in parts])
    for number, part in enumerate(parts):
        if found is not None:
            part.shared = False
            OfOutput(part, reader)(_without_noise(found[number], part.head.likelihood.event_dims))
        elif factor is not None:
            device = computed.logits[number].device
            part.mask = torch.ones(part.prediction_shape, dtype=torch.bool, device=device)
            part.weights = part.mask * (factor * part.head.weight / part.mask.numel())
    computed.release()


def _without_noise(gradient: Tensor, event_dims: int) -> Tensor:
    """Zero where a prediction has nothing but rounding."""
    size = gradient.abs()
    if event_dims:
        size = size.flatten(size.ndim - event_dims).amax(-1)
    nothing = size <= 1e-7 * size.max()
    return gradient.masked_fill(nothing.view(*nothing.shape, *[1] * event_dims), 0.0)
