"""Logits, loss and labels found in what a model returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "SAME_LOSS",
    "distances_of_loss",
    "find_logits",
    "find_loss",
    "find_named",
    "items_of_part",
    "labels_mask",
    "mean_loss",
    "shift_by_loss",
    "shift_by_name",
    "tensors_in",
]


SAME_LOSS = 2e-3
"""Distance, relative, of two losses that are one."""


def find_logits(output: Any) -> Tensor | None:
    """The tensor itself, ``.logits``, ``["logits"]``, or the first floating tensor of two or more dimensions
    in a tuple.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = output.get("logits")
        return named if isinstance(named, Tensor) else None
    if hasattr(output, "logits"):
        return output.logits if isinstance(output.logits, Tensor) else None
    if isinstance(output, (tuple, list)):
        return next(
            (t for t in output if isinstance(t, Tensor) and t.is_floating_point() and t.ndim >= 2), None
        )
    return None


def find_named(output: Any, name: str) -> Tensor | None:
    """``output[name]`` of a mapping, ``output.name`` of anything else."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def find_loss(output: Any) -> Tensor | None:
    """``["loss"]``, ``.loss``, the first 0-dim tensor in a tuple, or the output itself if it is one."""
    if isinstance(output, Tensor):
        return output if output.ndim == 0 else None
    if isinstance(output, Mapping):
        named = output.get("loss")
        return named if isinstance(named, Tensor) else None
    if isinstance(output, (tuple, list)):
        return next((t for t in output if isinstance(t, Tensor) and t.ndim == 0), None)
    named = getattr(output, "loss", None)
    return named if isinstance(named, Tensor) else None


def mean_loss(output: Any, kwargs: Mapping[str, Any], count: int) -> Tensor:
    """The loss in the output, as a mean over the ``count`` predictions of its micro-batch.

    Hugging Face models divide their cross-entropy by ``num_items_in_batch`` instead, the count of the whole
    accumulated batch, when it is given; and add other losses (a router's) to it undivided.
    """
    loss = find_loss(output)
    if loss is None:
        raise RuntimeError(
            f"this estimator needs the training loss, but the model returned {type(output).__name__} "
            "without one (no .loss, no "
            "['loss'], no 0-dim tensor in a tuple). Pass the labels to the model, or give the estimator "
            "loss_fn=lambda output, args, kwargs: ..."
        )
    items = kwargs.get("num_items_in_batch")
    return loss if items is None else loss * (items / max(count, 1))


def items_of_part(kwargs: dict[str, Any], part: int, whole: int) -> dict[str, Any]:
    """Arguments for some rows of a micro-batch, whose loss then is that of all of its rows but for chance.

    ``num_items_in_batch`` divides the cross-entropy alone, so it must shrink with the rows: the loss as a
    whole must not be scaled, as a router's loss in it is a mean over whatever it sees.

    >>> items_of_part({"num_items_in_batch": 16}, 2, 8)
    {'num_items_in_batch': 4.0}
    """
    items = kwargs.get("num_items_in_batch")
    if items is None or not part or not whole:
        return kwargs
    return {**kwargs, "num_items_in_batch": items * part / whole}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def labels_mask(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size, classes: int, *, shift: int
) -> Tensor | None:
    """Which predictions have a label, read from the labels among the arguments of the forward; None without
    labels.

    ``shift`` is 1 where the model itself shifts the labels against the logits (prediction t answers to label
    t + 1).
    """
    labels = _labels_among(args, kwargs, shape)
    if labels is None:
        return None
    valid = (labels >= 0) & (labels < classes)
    if shift:
        valid = torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)
    return valid


def shift_by_name(module: nn.Module) -> int:
    """1 for models known to shift their labels themselves (Hugging Face causal language models), else 0."""
    base: Any = getattr(module, "_orig_mod", module)
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    causal = "CausalLM" in str(getattr(base, "loss_type", ""))
    return int(causal or type(base).__name__.endswith(("ForCausalLM", "LMHeadModel")))


def distances_of_loss(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], logits: Tensor, loss: Tensor | None
) -> tuple[float, ...]:
    """How far the returned loss is from the mean cross-entropy of the labels, in units of itself: as they
    stand, and shifted by one. Empty if there is nothing to compare.

    Divided by ``num_items_in_batch`` instead where that is given, as in `mean_loss`.
    """
    labels = _labels_among(args, kwargs, logits.shape[:-1])
    if labels is None or loss is None or loss.ndim != 0 or logits.ndim not in (2, 3):
        return ()
    actual, items = float(loss.detach()), kwargs.get("num_items_in_batch")
    distances: list[float] = []
    for shift in (0, 1)[: logits.ndim - 1]:
        length = logits.shape[-2] - shift
        z = logits[..., :length, :].reshape(-1, logits.shape[-1])
        y = labels[..., shift:].reshape(-1)
        keep = (y >= 0) & (y < z.shape[-1])
        if not bool(keep.any()):
            return ()
        plain = float(F.cross_entropy(z[keep].float(), y[keep].long()))
        plain *= 1.0 if items is None else float(keep.sum()) / float(items)
        distances.append(abs(plain - actual) / max(abs(actual), 1e-9))
    return tuple(distances)


def shift_by_loss(distances: Sequence[float]) -> int | None:
    """The alignment under which plain cross-entropy gives the returned loss, if it is unambiguous; else None.

    At random initialisation or in bfloat16 both alignments come close: the better one must be ten times
    better.

    >>> shift_by_loss((0.4, 1e-5)), shift_by_loss((2e-4, 1e-4)), shift_by_loss(())
    (1, None, None)
    """
    if len(distances) < 2:
        return None
    near, far = sorted(distances)
    return distances.index(near) if near < SAME_LOSS and far > 10 * near else None


def _labels_among(args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size) -> Tensor | None:
    named = [kwargs.get(name) for name in ("labels", "targets", "target", "y")]
    for candidate in (*named, *args[1:]):
        if (
            isinstance(candidate, Tensor)
            and candidate.shape == shape
            and not candidate.is_floating_point()
            and candidate.dtype != torch.bool
        ):
            return candidate
    return None
