"""What is kept of a training forward until the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from sophia.likelihoods import Head, Problem, Reading
from sophia.refresh.computed import Computed
from sophia.refresh.conditions import Conditions
from sophia.refresh.graph_search import Kin
from sophia.refresh.places import Place
from sophia.refresh.views import View

__all__ = ["Autocast", "Other", "Outputs", "Recording", "Source", "trained"]


@dataclass(frozen=True)
class Autocast:
    """The autocast state of a forward."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        """The state at this moment."""
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def again(self) -> torch.autocast:
        """A context that restores it."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


@dataclass(eq=False)
class Outputs:
    """One output of a recorded forward: what a head speaks of, or one of several that it speaks of."""

    head: Head
    shape: torch.Size
    returned: bool
    """Whether this very tensor is in the model's output: then a loss that uses it sends it a gradient."""
    place: Place | None = None
    """Where it is found in what the model returned; None for the output that every forward has of its
    head.
    """
    mask: Tensor | None = None
    """Which predictions count; None until something says so."""
    probes: Any = None
    """What the likelihood keeps of the outputs, to read weights from their gradient."""
    sample: Tensor | None = None
    """Numbers of the predictions whose weights are read; None for all (``sampled_reading.py``)."""
    equal: bool = True
    """Whether the weights that were read are one number, so that a sample may do next time."""
    weights: Tensor | None = None
    """What each prediction weighs in the loss, summed over backwards; None where it was not read."""
    stated: Tensor | None = None
    """What each weighs in a mean, where ``mask_fn`` has returned numbers."""
    by_labels: bool = False
    """Whether labels among the inputs say what counts, as no gradient came."""
    shared: bool = False
    """Whether another head is computed from it, so that its gradient is not that of its own loss alone."""
    unread: bool = False
    """Whether a gradient came whose weights cannot be read."""
    fit: float | None = None
    """Share of the predictions whose gradient is that of the head's loss, the least of all backwards; None
    where the likelihood does not ask.
    """
    name: str = ""
    """As one writes it, for one that is found by its place."""
    gradient: Tensor | None = None
    """What arrived, if it was nothing that the likelihood could have sent."""
    problems: list[Problem] = field(default_factory=list)
    """Of the gradients that came: they are spoken of at the step (``misread.py``), not inside a backward."""
    views: list[View] = field(default_factory=list)
    """Outputs that are views of this one, whose gradients arrive here a second time."""
    apart: bool = False
    """Whether what came through the views was taken off."""
    unread_gradients: list[tuple[Callable[[Any, Tensor], None], Tensor]] = field(default_factory=list)
    """What arrived in the hidden states before a sharded output layer, and who reads it once that is whole:
    ranks gather it at the step, and not inside a backward.
    """

    @property
    def prediction_shape(self) -> torch.Size:
        """Shape of the mask: ``(B, T)`` for logits ``(B, T, V)``."""
        return self.shape[: len(self.shape) - self.head.likelihood.event_dims]

    def state(self, mask: Any) -> None:
        """Take what ``mask_fn`` says: which predictions count, or what each weighs in a mean."""
        if isinstance(mask, Tensor) and mask.is_floating_point():
            self.stated = mask.detach()
            mask = self.stated != 0
        self.mask = mask

    def take(self, reading: Reading) -> None:
        """Add what was read from one backward: two of them add up in ``.grad``, and so do the weights."""
        if reading.weights is None:
            self.unread = True
        else:
            self.weights = reading.weights if self.weights is None else self.weights + reading.weights
        if reading.fit is not None:
            self.fit = reading.fit if self.fit is None else min(self.fit, reading.fit)


@dataclass(eq=False)
class Other:
    """A tensor that the model returned beside what its heads speak of."""

    part: Outputs
    """As which it joins them, if it is of their kind."""
    name: str
    """As one writes it."""
    kin: Kin
    tensor: TensorWeakRef
    asked: bool
    """Whether it may join; else it is only noted that a gradient came."""
    of_view: bool = False
    """Whether it is a view of what the head speaks of."""
    reached: bool = False
    unlike: bool = False
    """Whether a gradient came that is not of the head's kind."""
    likelihood: str = "Gaussian()"
    """What it might be instead."""


class Source(Protocol):
    """Where the predictions of a model are that does not return them."""

    def seen(self) -> AbstractContextManager[None]:
        """Inside, a forward shows them."""

    def find(self, output: Any) -> tuple[Tensor, ...]:
        """Those of the forward that has just run."""


@dataclass(eq=False)
class Recording:
    """One training forward: what is needed to run it again."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: Autocast
    outputs: tuple[Outputs, ...]
    """One for each head of the likelihood; from ``step()`` on also those that the loss used beside it."""
    conditions: Conditions
    """Under which it was run."""
    others: list[Other] = field(default_factory=list)
    """What else the model returned, until it is known whether the loss used it."""
    pairs: list[tuple[int, int]] = field(default_factory=list)
    """Numbers of outputs of which the second is a view of the first."""
    computed: Computed | None = None
    """Logits that ``logits_fn`` computes, until it is known what has arrived in what they are made of."""
    source: Source | None = None
    """Where the outputs are that the model does not return; None for returned ones."""
    arrived: dict[Place, Tensor] = field(default_factory=dict)
    """Gradients that came to what it returned, where the outputs are still to be found."""
    other_losses: Sequence[str] = ()
    """Names of losses of another kind in the graph of what it returned."""
    loss_gradient: Tensor | None = None
    """What has arrived in the loss that the model returned: its factor in the loss that is trained."""
    loss_place: Place | None = None
    """Where that loss stands in what the model returned."""
    first: Place | None = None
    """Where the first of the outputs stands in what the model returned, if it does."""
    name: str = "output"
    """What the first of the outputs is called in what the model returned."""
    reached: bool = False
    """Whether a backward has come through the outputs of this forward."""
    evaluation: bool = False
    """Whether the model was in evaluation mode: then it is a training forward only if a backward says so."""
    refused: Exception | None = None
    """Why nothing can be made of the outputs of such a forward."""
    kept: bool = False
    graph: Any = None
    """Both for ``arrivals.py``."""
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    """Inputs with their version counters, which tell whether somebody wrote into them since."""

    def seen(self) -> AbstractContextManager[None]:
        """Inside, another forward shows the outputs as this one did."""
        return nullcontext() if self.source is None else self.source.seen()

    def overwritten(self) -> bool:
        """Whether an input has been changed in place since the forward."""
        return any(tensor._version != version for tensor, version in self.versions)


def trained(recordings: Sequence[Recording]) -> list[Recording]:
    """Those that entered the loss: where a backward came through some, no others (a validation without
    ``eval()``); and those in evaluation mode only if it came through them, and through none in training mode.
    """
    reached = [recording for recording in recordings if recording.reached]
    training = [recording for recording in reached or recordings if not recording.evaluation]
    return training or reached
