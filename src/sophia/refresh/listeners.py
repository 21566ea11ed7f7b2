"""Hooks on tensors that a model returned: what the gradients that arrive in them say.

All hold their recording weakly: they must not keep it, or the graph, alive.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports

from sophia.refresh.other_outputs import own_gradient
from sophia.refresh.places import Place
from sophia.refresh.recording import Outputs, Recording
from sophia.refresh.sampled_reading import read

__all__ = ["Keeper", "OfLoss", "OfOutput"]


class Reader(Protocol):
    """What is asked of the recorder."""

    named: bool
    maximize: bool


class OfOutput:
    """Reads from the gradient of the logits which predictions count, and what they weigh."""

    def __init__(self, outputs: Outputs, reader: Reader) -> None:
        self._outputs, self._reader = weakref.ref(outputs), weakref.ref(reader)

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        outputs, reader = self._outputs(), self._reader()
        if outputs is None or reader is None or gradient is None:
            return  # a compiled graph with the loss inside gives no gradient to the logits
        gradient = own_gradient(outputs, gradient, always=reader.named)
        counted = outputs.head.likelihood.counted(gradient)
        if outputs.shared:
            outputs.unread = True
            outputs.mask = counted if outputs.mask is None else outputs.mask | counted
            return
        turned = -gradient if reader.maximize else gradient
        reading = read(outputs, turned, counted)
        if reading.problem is not None:
            outputs.problems.append(reading.problem)
            if reading.problem.nonsense:
                so_far = outputs.gradient
                outputs.gradient = gradient if so_far is None else so_far + gradient
        outputs.take(reading)
        outputs.mask = counted if outputs.mask is None else outputs.mask | counted


class Keeper:
    """Keeps the gradient that arrives in a returned tensor."""

    def __init__(self, recording: Recording, place: Place) -> None:
        self._recording, self._place = weakref.ref(recording), place

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        recording = self._recording()
        if recording is not None and gradient is not None:
            so_far = recording.arrived.get(self._place)
            kept = gradient.detach()
            recording.arrived[self._place] = kept.clone() if so_far is None else so_far + kept


class OfLoss:
    """Notes the factor of the returned loss in the one that is trained."""

    def __init__(self, recording: Recording) -> None:
        self._recording = weakref.ref(recording)

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        recording = self._recording()
        if recording is not None and gradient is not None:
            so_far = recording.loss_gradient
            recording.loss_gradient = gradient.detach().clone() if so_far is None else so_far + gradient
