"""Rows of a run's log, and its result: every key that is written and read, in the order of writing.

The log (``log.jsonl``) holds `TrainRow` and `EvaluationRow`, told apart by ``kind``; the result
(``result.json``) is an `EndRow`. Numbers that are not finite are written as null.
"""

# Without postponed annotations: Python itself then knows which keys a row may lack.
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

__all__ = ["EndNumber", "EndRow", "EvaluationRow", "SharedPart", "TrainRow", "zeros_of_curvature"]


class TrainRow(TypedDict):
    """Training since the row before. What the optimizer says of itself stands in front of these, under keys
    of its own.
    """

    kind: Literal["train"]
    step: int
    """Optimizer steps done."""
    loss: float
    """Mean training loss of the steps since the row before, nats a token."""
    lr: float
    """Learning rate of the first parameter group at the last step."""
    grad_norm: float
    """Norm of the last step's gradient, before clipping."""
    gradient_clipped: float
    """Share of the steps since the row before whose gradient was clipped."""
    tokens: int
    """Tokens read so far."""
    gradient_evaluations: float
    """Gradients of a whole batch so far; the passes of a refresh count by their share of the batch."""
    seconds: float
    """Wall seconds of the steps so far: rows, evaluations and checkpoints are not in it."""
    cpu_seconds: float
    """Processor seconds of the same, in the process that writes."""
    unclipped: NotRequired[float]
    """Share of coordinates that the update's clip leaves alone: the one number that the lab reads of those
    that an optimizer says of itself.
    """


def zeros_of_curvature(numbers: Mapping[str, Any]) -> frozenset[str]:
    """Names of what an optimizer says of h, where it has none: zeros that no table or picture may show.

    >>> sorted(zeros_of_curvature({"has_curvature": 0.0, "unclipped": 0.0, "h_q50": 0.0, "lr": 0.1}))
    ['h_q50', 'unclipped']
    >>> zeros_of_curvature({"has_curvature": 0.9, "unclipped": 0.2}), zeros_of_curvature({"unclipped": 0.2})
    (frozenset(), frozenset())
    """
    if numbers.get("has_curvature", 1) != 0:
        return frozenset()
    return frozenset(k for k in numbers if k in ("unclipped", "eps_limited") or k.startswith("h_"))


class EvaluationRow(TypedDict):
    """Loss on the held-out text."""

    kind: Literal["eval"]
    step: int
    """Optimizer steps done; 0 before the first."""
    loss: float
    """Mean over all held-out predictions, nats a token."""
    bits_per_byte: float | None
    """The same by the text's bytes; None where their number is not known."""


class SharedPart(TypedDict):
    """First steps of a run that another run of the same contender and seed had done for it."""

    run: str
    """Hash of the other run."""
    steps: int
    """How many steps they share."""
    seconds: float
    """Wall seconds of that part."""
    cpu_seconds: float
    """Processor seconds of that part."""


class EndRow(TypedDict):
    """How a run ended. Counts and seconds are of the whole run."""

    status: Literal["finished", "diverged"]
    loss: float | None
    """Held-out loss after the last step, nats a token; None if the run diverged."""
    bits_per_byte: float | None
    """The same by the text's bytes."""
    steps: int
    """Optimizer steps done."""
    tokens: int
    """Tokens read."""
    gradient_evaluations: float
    """As in `TrainRow`."""
    flops: float
    """6 a parameter, token and gradient evaluation; attention scores are not in it."""
    seconds: float
    """As in `TrainRow`."""
    cpu_seconds: float
    """As in `TrainRow`."""
    parameters: int
    """Trained numbers of the model."""
    state_bytes: int
    """Bytes of the optimizer's state."""
    unclipped: float | None
    """Mean over the training rows that have it."""
    gradient_clipped: float | None
    """Share of all steps whose gradient was clipped; None if there was no step."""
    trunk: NotRequired[SharedPart]
    """In records of older releases: the part that was trained once for several budgets."""
    environment: Mapping[str, Any]
    """Versions, machine, commit and a hash of the code; the ``numerics``, ``kernels`` and ``fingerprint`` of
    the optimizer (``sophia.lab.training.fingerprint``).
    """


EndNumber = Literal[
    "loss",
    "bits_per_byte",
    "steps",
    "tokens",
    "gradient_evaluations",
    "flops",
    "seconds",
    "cpu_seconds",
    "parameters",
    "state_bytes",
    "unclipped",
    "gradient_clipped",
]
"""Keys of `EndRow` whose values are numbers."""
