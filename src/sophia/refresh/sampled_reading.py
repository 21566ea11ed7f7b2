"""Weights read from a sample of the predictions, where those of the whole step were equal before.

To read the weight of a prediction takes a pass over its outputs. Where a reading of all predictions has
found one weight for all of them (a mean, a sum, any factor), the next ones read a few dozen. If these
differ after all, they stand for the others, without bias, and the next refresh reads all again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sophia.likelihoods import Likelihood, Reading
from sophia.refresh.recording import Outputs
from sophia.refresh.seeds import generator

__all__ = ["ALL_AGAIN", "read", "rows_to_read", "take_probes"]

ALL_AGAIN = 64
"""Refreshes after which all predictions are read once more."""
_SAMPLE = 64
_LEAST = 1 / 8  # of the predictions of a step, that must count for a sample to find enough of them


def rows_to_read(number: int, key: tuple[int, ...] | None) -> Tensor | None:
    """Numbers of the predictions to read, ``(s,)``; None for all: ``key`` is None, or there are not many."""
    if key is None or number < 4 * _SAMPLE:
        return None
    noise = generator(torch.device("cpu"), *key, "predictions that are read")
    drawn = torch.randint(number, (_SAMPLE,), generator=noise)
    return torch.tensor(sorted(set(drawn.tolist())))


def take_probes(part: Outputs, outputs: Tensor, key: tuple[int, ...] | None) -> None:
    """Keep of an output what the weights of its predictions are read from.

    Args:
        part: where to keep it.
        outputs: the tensor.
        key: of the sample; None to read all predictions.
    """
    likelihood = part.head.likelihood
    # Outputs of one dimension a prediction cost no pass worth saving; views are told apart by all of them.
    if likelihood.event_dims == 1 and not part.views:
        part.sample = rows_to_read(part.prediction_shape.numel(), key)
    if part.sample is not None:
        part.sample = part.sample.to(outputs.device)
        outputs = outputs.detach().reshape(-1, outputs.shape[-1])[part.sample]
    part.probes = likelihood.probes(outputs)


def read(part: Outputs, gradient: Tensor, counted: Tensor) -> Reading:
    """Read the weights of the predictions that count, and note in ``part`` whether they are equal."""
    likelihood, rows = part.head.likelihood, part.sample
    if rows is None:
        reading = likelihood.weights(gradient, part.probes, counted)
        found = None if reading.weights is None else reading.weights[counted]
        enough = int(counted.sum()) >= _LEAST * counted.numel()
        part.equal &= enough and found is not None and _are_equal(found)
        return reading
    reading, mask = _of_sample(likelihood, part.probes, rows, gradient, counted)
    if reading.weights is None or not bool(mask.any()):
        part.equal = False
        return replace(reading, weights=None)
    every = torch.zeros(counted.shape, dtype=reading.weights.dtype, device=counted.device)
    found = reading.weights[mask]
    if _are_equal(found):
        every[counted] = found[0]
    else:
        part.equal = False
        every.view(-1)[rows[mask]] = found * (counted.sum() / mask.sum())
    return replace(reading, weights=every)


def _of_sample(
    likelihood: Likelihood, probes: Any, rows: Tensor, gradient: Tensor, counted: Tensor
) -> tuple[Reading, Tensor]:
    mask = counted.reshape(-1)[rows]
    return likelihood.weights(gradient.reshape(-1, gradient.shape[-1])[rows], probes, mask), mask


def _are_equal(weights: Tensor) -> bool:
    return bool(weights.numel()) and bool((weights == weights[0]).all())
