"""Which recorded forwards a backward has reached, and whether the gradients that it left are still there.

A recording counts for the step if the gradient of its loss is in ``.grad`` when the step is taken. So it is
dropped when that gradient was thrown away (a batch with NaN, a scaler that skipped the step, the
discriminator's gradients of a generator's loss, all of them cleared by ``model.zero_grad()``, which tells an
optimizer nothing), and when no backward can reach it any more, as its graph is gone.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports
from torch.utils.weak import TensorWeakRef

from sophia.checks import SophiaWarning
from sophia.distributed.shards import is_dtensor
from sophia.distributed.wrappers import parameters_at_rest
from sophia.refresh.gradient_scale import GradientScale

__all__ = ["MOST", "MOST_UNUSED", "Arrivals", "Reachable"]

MOST = 1024
"""Recordings that are kept between two steps."""
MOST_UNUSED = 64
"""The same of those that nothing has come through and nothing can, while no other was reached either: there
the loss may have been computed on copies of the outputs.
"""


class Reachable(Protocol):
    """What is kept of a recording here."""

    reached: bool
    """Whether a backward has come through."""
    evaluation: bool
    """Whether it is a forward in evaluation mode, which counts only if a backward comes through."""
    kept: bool
    """Whether there were gradients in ``.grad`` at the end of that backward."""
    graph: Any
    """Weak reference to the hook on the outputs, which lives as long as their graph; None without one."""


class Holder(Protocol):
    """Who holds the recordings: the recorder."""

    model: nn.Module
    recordings: list[Any]


class Arrivals:
    """Watches the outputs of recorded forwards.

    Args:
        holder: its ``recordings`` are looked through; held weakly.
    """

    def __init__(self, holder: Holder) -> None:
        self._holder = weakref.ref(holder)
        # FSDP1 moves gradients about, so that nothing can be told from their absence.
        self._parameters = parameters_at_rest(holder.model)
        if any(getattr(p, "_fsdp_flattened", False) for p in self._parameters):
            self._parameters = []
        self._task: int | None = None  # of the backward that is running
        self._now: list[Reachable] = []  # what it has come through
        self._mark: tuple[TensorWeakRef, int] | None = (
            None  # a gradient and its version at the end of the last one
        )
        self._said = False
        self.scale = GradientScale()

    def listen(self, recording: Reachable, outputs: Iterable[Tensor]) -> None:
        """Note when a backward comes through one of the outputs."""
        hook = _Arrival(recording, self)
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
        recording.graph = weakref.ref(hook)

    def begin(self, recording: Reachable) -> None:
        """A backward has come to a recording."""
        if not self._ends_in_parameters():
            return
        task = torch._C._current_graph_task_id()
        if task != self._task or not self._now:
            self._task, self._now = task, []
            self.drop_thrown_away(but=recording)
            try:
                engine: Any = torch.autograd.Variable._execution_engine
                # After those that wrappers queue during the backward, as DDP does to finish its reduction.
                engine.queue_callback(lambda: engine.queue_callback(self._end))
            except RuntimeError:
                pass  # a compiled backward: its gradients are not followed
        recording.reached = True
        self._now.append(recording)

    def _ends_in_parameters(self) -> bool:
        """Whether the backward that is running leaves a gradient in a parameter, or hands one out; not
        ``torch.autograd.grad(loss, inputs)``, by which an attack looks for its direction.
        """
        engine: Any = torch.autograd.Variable._execution_engine
        if engine.is_checkpoint_valid():  # no inputs= were named, so that all are reached
            return True
        # Wrappers that shard have others in the graph.
        leaves = [p for p in self._parameters if p.requires_grad]
        if not leaves or not all(p.is_leaf and not is_dtensor(p) for p in leaves):
            return True
        with torch.enable_grad():
            ends: list[Any] = [p.view_as(p).grad_fn.next_functions[0][0] for p in leaves]  # type: ignore[union-attr]
        try:
            return any(torch._C._will_engine_execute_node(end) for end in ends)
        except RuntimeError:  # one of them is among the inputs of autograd.grad()
            return True

    @untraced
    def _end(self) -> None:
        """The backward is over, and what it computed stands in ``.grad``."""
        gradient = next(self._gradients(), None)
        self.scale.remember(self._parameters)
        self._mark = None if gradient is None else (TensorWeakRef(gradient), gradient._version)
        for recording in self._now:
            # Not where a wrapper keeps unreduced gradients elsewhere: their absence says nothing then.
            recording.kept = gradient is not None
        self._now = []

    def drop_thrown_away(self, but: Reachable | None = None) -> None:
        """Drop recordings whose gradients were in ``.grad`` and are no longer."""
        holder = self._holder()
        if holder is None or not any(r.reached and r.kept for r in holder.recordings):
            return
        if self._gone():
            holder.recordings = [r for r in holder.recordings if r is but or not (r.reached and r.kept)]

    def _gone(self) -> bool:
        """Whether all gradients of the model are None or zero."""
        for number, gradient in enumerate(self._gradients()):
            if number == 0 and self._is_marked(gradient):
                return False  # untouched since: no need to read it, which would wait for the device
            # A rank's shard may be zero, or empty, alone, and the ranks must agree.
            if gradient.layout != torch.strided or is_dtensor(gradient) or bool(gradient.any()):
                return False
        return True

    def _is_marked(self, gradient: Tensor) -> bool:
        return self._mark is not None and (self._mark[0]() is gradient and self._mark[1] == gradient._version)

    def tidy(self) -> None:
        """Drop what can no longer count, before one more is recorded."""
        self.drop_thrown_away()
        holder = self._holder()
        if holder is None:
            return
        recordings = holder.recordings
        unused = [r for r in recordings if not r.reached and (r.graph is None or r.graph() is None)]
        dropped = {id(r) for r in unused if r.evaluation}
        unused = [r for r in unused if not r.evaluation]
        if not any(r.reached for r in recordings):
            unused = unused[: max(0, len(unused) + 1 - MOST_UNUSED)]
            self._say(len(unused), f"{MOST_UNUSED} training forwards without a backward")
        dropped |= {id(r) for r in unused}
        if not dropped and len(recordings) >= MOST:
            dropped = {id(r) for r in recordings[: len(recordings) + 1 - MOST]}
            self._say(len(dropped), f"{MOST} training forwards")
        if dropped:
            holder.recordings = [r for r in recordings if id(r) not in dropped]

    def _say(self, dropped: int, what: str) -> None:
        if dropped and not self._said:
            self._said = True
            warnings.warn(
                f"more than {what} were recorded since the last step: the oldest are dropped, as their "
                "inputs would fill the memory. If they are no training (a validation, rollouts), call "
                "model.eval() or use torch.no_grad() there; if they are, h is renewed from the latest",
                SophiaWarning,
            )

    def _gradients(self) -> Iterator[Tensor]:
        return (parameter.grad for parameter in self._parameters if parameter.grad is not None)


class _Arrival:
    """Hook on the outputs of one recording. Weak: it must not keep the recording alive."""

    def __init__(self, recording: Reachable, arrivals: Arrivals) -> None:
        self._recording, self._arrivals = weakref.ref(recording), weakref.ref(arrivals)

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        recording, arrivals = self._recording(), self._arrivals()
        if recording is not None and arrivals is not None:
            arrivals.begin(recording)
