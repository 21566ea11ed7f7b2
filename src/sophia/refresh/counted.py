"""Which predictions of a recorded forward count, and what they weigh where no gradient tells.

By the gradient in the output; else by labels among the inputs, as the loss inside a compiled graph sends none
to the logits; else all.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sophia.checks import SophiaWarning
from sophia.distributed.wrappers import reshard
from sophia.refresh.model_outputs import (
    SAME_LOSS,
    distances_of_loss,
    find_loss,
    labels_mask,
    shift_by_loss,
    shift_by_name,
)
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import Outputs, Recording

__all__ = ["mask_from_labels", "mask_of"]


def mask_of(recorder: Recorder, recording: Recording, part: Outputs) -> Tensor:
    """Which predictions of one output count, bool, of the shape of its predictions.

    Raises:
        RuntimeError: ``mask_fn`` has returned something else.
    """
    shape = part.prediction_shape
    if part.mask is not None:
        if part.mask.shape != shape or part.mask.dtype != torch.bool:
            raise RuntimeError(
                f"mask_fn returned {part.mask.dtype} of shape {tuple(part.mask.shape)}, but the "
                f"predictions have shape {tuple(shape)}: return a bool mask of that shape, or numbers, what "
                "each weighs in a mean"
            )
        if part.stated is not None and not bool((part.stated >= 0).all()):
            raise RuntimeError(
                "mask_fn returned numbers below zero, or NaN: they are what each prediction weighs in the "
                "mean loss, (weights * losses).mean(), and a loss with a negative weight has no Gauss-Newton "
                "curvature. Use estimator='hutchinson' for such a loss"
            )
        return part.mask
    device = next(recorder.model.parameters()).device
    others = any(other.mask is not None for other in recording.outputs)
    if recording.source is not None or (part.returned and others):
        # The loss of this step left the head out, as its own output would have got a gradient.
        return torch.zeros(shape, dtype=torch.bool, device=device)
    mask = mask_from_labels(recorder, recording, part)
    if mask is not None:
        part.by_labels = True
        part.weights = _weights_of_mean(recorder, recording, mask)
        return mask
    where = "the logits" if len(recording.outputs) == 1 else f"the head {part.head.name!r}"
    if where not in recorder.guessed:
        recorder.guessed.add(where)
        warnings.warn(
            f"no gradient reached {where} and no labels were found among the inputs: counting every "
            "position. If some are padding, B is too large; pass mask_fn=",
            SophiaWarning,
        )
    return torch.ones(shape, dtype=torch.bool, device=device)


def mask_from_labels(recorder: Recorder, recording: Recording, part: Outputs) -> Tensor | None:
    """Which predictions have a label among the inputs; None without labels."""
    shape = part.prediction_shape
    classifiers = [head for head in recorder.heads if head.likelihood.event_dims == 1]
    # With two of them it would be a guess whose labels these are.
    if classifiers != [part.head] or len(shape) < 1:
        return None
    args, kwargs, classes = recording.args, recording.kwargs, part.shape[-1]
    if labels_mask(args, kwargs, shape, classes, shift=0) is None:
        return None
    if recorder.label_shift is None and len(shape) <= 2:
        # Once per model: one more forward tells whether the model shifts its labels itself. With gradients
        # on, as without them a compiled model would compile again.
        with recording.autocast.again():
            output = recorder.model(*args, **kwargs)
        logits = recorder.find_outputs(output)[recorder.heads.index(part.head)]
        distances = distances_of_loss(args, kwargs, logits.detach(), find_loss(output))
        reshard(recorder.model)
        by_loss = shift_by_loss(distances)
        by_name = shift_by_name(recorder.model) if len(shape) == 2 else 0
        recorder.label_shift = by_name if by_loss is None else by_loss
        recorder.loss_is_mean = bool(distances) and distances[recorder.label_shift] < SAME_LOSS
    return labels_mask(args, kwargs, shape, classes, shift=recorder.label_shift or 0)


def _weights_of_mean(recorder: Recorder, recording: Recording, mask: Tensor) -> Tensor | None:
    """What each prediction weighs where the model returns the mean cross-entropy of its labels, and a factor
    of that was trained; None where it does not.
    """
    if not recorder.loss_is_mean or recording.loss_gradient is None:
        return None
    divisor = recording.kwargs.get("num_items_in_batch")
    divisor = float(mask.sum()) if divisor is None else float(divisor)
    return mask * (recording.loss_gradient.float().to(mask.device) / max(divisor, 1.0))
