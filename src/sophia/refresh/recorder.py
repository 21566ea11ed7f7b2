"""Recorder of the training forwards, so that ``step()`` can run them again for a refresh of h.

Two hooks on the model keep, on the steps where a refresh is due, *references* to what the model was called
with, the autocast state, and which predictions entered the loss. The last is read from the user's own
backward: a hook on the logits notes the rows whose gradient is not zero. By definition that is the set of
predictions in the loss, for every padding, shift, mask, external loss or label smoothing. Labels among the
arguments are the fall-back (a compiled graph with the loss inside hands no gradient to the logits), and if
there are none everything counts, with a warning.

Nothing here knows the optimizer: it sets ``active`` on due steps, reads ``recordings`` and calls ``forget``.
The hooks hold no reference to the recorder, the logits or the graph; copies and pickles of the model carry
hooks that do nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# torch.compile must not trace the hooks: recording is a side effect, which a graph would bake in. The public
# torch.compiler.disable is the same, but imports the compiler as soon as this file is read.
from torch._compile import _disable_dynamo as untraced

from sophia.distributed.shards import is_dtensor
from sophia.likelihoods import Head, Heads, Likelihood, heads_of
from sophia.refresh.arrivals import Arrivals
from sophia.refresh.computed import Computed
from sophia.refresh.conditions import Witnesses
from sophia.refresh.hook import Hook
from sophia.refresh.model_outputs import find_logits, find_loss, find_named, tensors_in
from sophia.refresh.other_outputs import OtherOutputs, own_gradient
from sophia.refresh.places import at, fields, names_in
from sophia.refresh.recording import Autocast, Outputs, Recording
from sophia.refresh.sampled_reading import read, take_probes
from sophia.refresh.sandbox import in_sandbox
from sophia.refresh.views import Through, is_view_of

__all__ = ["Autocast", "Outputs", "Recorder", "Recording", "is_training_forward"]


def is_training_forward(model: nn.Module) -> bool:
    """Whether a forward of ``model`` that begins now may be one of a training step."""
    if in_sandbox() or not (model.training and torch.is_grad_enabled()):
        return False
    if torch._C._is_tracing() or torch.compiler.is_compiling():  # the forward of an export
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # inside torch.func (vmap, grad, hessian) there is no .grad, and no step follows
    # All frozen, as a discriminator in its generator's step: then the loss is not about it.
    return any(p.requires_grad for p in model.parameters())


class Recorder:
    """Keeps the training forwards of ``model`` while ``active``.

    Args:
        model: the module that is really called in the loop and returns logits.
        likelihood: says what a prediction is, and how to see from a gradient whether it counted.
        logits_fn: ``logits_fn(output) -> Tensor``, for models whose logits are not found; a mapping by name
            for several heads.
        mask_fn: ``mask_fn(args, kwargs, output) -> bool mask``, for losses whose gradient does not tell; a
            mapping by name for several heads.
        copy_inputs: keep copies of the inputs, for loops that write into static buffers.
        needs_outputs: whether the estimator does; else a model may return its loss alone.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | Heads,
        *,
        logits_fn: Callable[[Any], Any] | None = None,
        mask_fn: Callable[[tuple[Any, ...], Mapping[str, Any], Any], Any] | None = None,
        copy_inputs: bool = False,
        needs_outputs: bool = True,
    ) -> None:
        self.model, self.heads, self.named = model, heads_of(likelihood), isinstance(likelihood, Heads)
        self.logits_fn, self.mask_fn, self.copy_inputs = logits_fn, mask_fn, copy_inputs
        self.needs_outputs = needs_outputs
        self.other_outputs = OtherOutputs(
            type(model).__name__,
            asked=logits_fn is None and mask_fn is None and not self.named,
            named=self.named,
            silent=not needs_outputs,
        )
        self.active = False
        self.sample: tuple[int, ...] | None = None
        """Key of the sample of predictions whose weights are read; None to read all."""
        self.recordings: list[Recording] = []
        self.unrecorded = False
        """Whether a training forward came since the last step that was not recorded, as no refresh is due."""
        self.arrivals = Arrivals(self)
        self.witnesses = Witnesses(model)
        self._pending: tuple[tuple[Any, ...], Mapping[str, Any], Any] | None = None
        self.label_shift: int | None = None
        """Whether the model shifts its labels itself, once it had to be found out."""
        self.loss_is_mean = False
        """Whether the loss that it returns was then seen to be the mean cross-entropy of these labels."""
        self.guessed: set[str] = set()
        """Outputs of which it was said that all of their predictions are counted."""
        self.maximize = False
        """Whether the loss is to be maximised: then its gradient is minus that of a likelihood's."""
        self._handles = [
            model.register_forward_pre_hook(Hook(self, "before"), with_kwargs=True),
            model.register_forward_hook(Hook(self, "after"), with_kwargs=True),
        ]

    def unhook(self) -> None:
        """Take the hooks off the model; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def detach(self) -> None:
        """Take the hooks off the model, and forget."""
        self.unhook()
        self.forget()

    def forget(self) -> None:
        """Drop everything recorded: the step has been taken."""
        self.recordings.clear()
        self._pending, self.unrecorded = None, False

    def forget_reached(self) -> None:
        """Drop the recordings whose backward has run.

        Called on the optimizer's ``zero_grad``: it clears after a step that was skipped, and spares the
        forward of a trainer that zeroes the gradients between forward and backward. What the model's own
        ``zero_grad`` clears is found by ``arrivals.py``.
        """
        self.recordings = [recording for recording in self.recordings if not recording.reached]

    def counts(self) -> bool:
        """Whether a backward came through a recorded forward, and its gradients were not thrown away; of one
        that was not recorded, whether it came.
        """
        self.arrivals.drop_thrown_away()
        return self.unrecorded or any(recording.reached for recording in self.recordings)

    def weights_are_equal(self) -> bool:
        """Whether the weights of all predictions of the step were read, and each forward has one for all; or
        no gradient came of which they could be.
        """
        parts = [part for recording in self.recordings if recording.reached for part in recording.outputs]
        read = all(p.mask is None or (p.weights is not None and not p.unread) for p in parts)
        return bool(parts) and read and all(part.equal for part in parts)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: note the inputs before the model can change them."""
        if not is_training_forward(model):
            return
        if not self.active:
            self.unrecorded = True
            return
        self.arrivals.tidy()
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                f"{type(model).__name__} runs inside torch.nn.DataParallel, which gives each device a copy "
                "of the model and a part of the batch: their forwards cannot be run again on this one. Start "
                "one process a device (torchrun, DistributedDataParallel), or show one device to this one"
            )
        if self.copy_inputs:
            args, kwargs = _copied(args), _copied(kwargs)
        self._pending = (args, dict(kwargs), self.witnesses.before(model, args, kwargs))

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: find the logits and listen to their gradient."""
        if self._pending is None or in_sandbox():
            return
        (args, kwargs, noted), self._pending = self._pending, None  # type: ignore[assignment]
        device_type = next((p.device.type for p in model.parameters()), "cpu")
        conditions = self.witnesses.after(model, noted, tensors_in(fields(output)))
        recording = Recording(args, kwargs, Autocast.now(device_type), (), conditions)
        recording.versions = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        if not self._is_loss_alone(output):
            self._listen(recording, output)
        self.arrivals.listen(recording, tensors_in(fields(output)))
        self.recordings.append(recording)

    def _listen(self, recording: Recording, output: Any) -> None:
        found = self.find_outputs(output)
        returned = {id(tensor): tensor for tensor in tensors_in(fields(output))}
        recording.outputs = tuple(
            Outputs(head, tensor.shape, id(tensor) in returned)
            for head, tensor in zip(self.heads, found, strict=True)
        )
        self.other_outputs.listen(recording, output, found)
        if self.mask_fn is not None:
            masks = self._by_head(self.mask_fn(recording.args, recording.kwargs, output), "mask_fn")
            for part, mask in zip(recording.outputs, masks, strict=True):
                part.mask = mask
            return
        bases = [
            None if p.returned else _viewed(t, returned.values())
            for p, t in zip(recording.outputs, found, strict=True)
        ]
        computes = any(not p.returned and b is None for p, b in zip(recording.outputs, bases, strict=True))
        if computes and self.logits_fn is not None:
            recording.computed = Computed.of(output, self.find_outputs)
        for part, tensor, base in zip(recording.outputs, found, bases, strict=True):
            # Where one head is computed from another, the gradient in the other is that of both.
            part.shared = computes and (part.returned or base is not None)
            if tensor.requires_grad:
                take_probes(part, tensor, self.sample)
                # A view that logits_fn has made is not what the loss is made of: its gradient stays away.
                listener: Any = _Listener(part, self)
                if base is not None:
                    tensor, listener = base, Through(tensor, base, listener)
                tensor.register_hook(listener)  # type: ignore[no-untyped-call]
        loss = find_loss(output)
        if loss is not None and loss.ndim == 0 and loss.requires_grad:
            loss.register_hook(_OfLoss(recording))  # type: ignore[no-untyped-call]

    def listen_to(self, part: Outputs) -> _Listener:
        """What reads the gradient of an output."""
        return _Listener(part, self)

    def _is_loss_alone(self, output: Any) -> bool:
        """Whether the estimator finds its loss in an output that has nothing else to offer."""
        if self.needs_outputs or self.logits_fn is not None or self.mask_fn is not None or self.named:
            return False
        logits = find_logits(output)
        return not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim)

    def outputs_of(self, recording: Recording, output: Any) -> tuple[Any, ...]:
        """The tensors in ``output`` that stand where those of a recording stood."""
        if not recording.outputs:
            return ()
        more = (at(output, part.place) for part in recording.outputs if part.place is not None)
        return (*self.find_outputs(output), *more)

    def find_outputs(self, output: Any) -> tuple[Tensor, ...]:
        """The outputs that the likelihood speaks of, one for each head; RuntimeError if one is not there."""
        if self.logits_fn is not None:
            found = self._by_head(self.logits_fn(output), "logits_fn")
        elif self.named:
            found = tuple(find_named(output, head.name) for head in self.heads)
        else:
            found = (find_logits(output),)
        for head, tensor in zip(self.heads, found, strict=True):
            self._check(head, tensor, output)
        return found

    def _by_head(self, value: Any, source: str) -> tuple[Any, ...]:
        if not self.named:
            return (value,)
        names = [head.name for head in self.heads]
        if not isinstance(value, Mapping) or set(names) - set(value):
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            raise RuntimeError(
                f"{source} returned {got}, but the likelihood has the heads {names}: return a mapping with "
                f"these names, for instance {{{names[0]!r}: output[0], ...}}"
            )
        return tuple(value[name] for name in names)

    def _check(self, head: Head, tensor: Any, output: Any) -> None:
        name = type(self.model).__name__
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what, example = (
                (f"the head {head.name!r}", f"a mapping with {head.name!r}")
                if self.named
                else ("logits", "the logits")
            )
            raise RuntimeError(
                f"cannot find {what} in the output of {name} ({type(output).__name__}){names_in(output)}; "
                f"pass logits_fn=, a function from the output to {example}. A model with a fused linear "
                "cross-entropy returns none: build them from its hidden states (logits_fn=lambda output: "
                "model.lm_head(output.hidden_states[-1])), let it return them in training, or use "
                "mode='manual'. One whose outputs are compared with each other (embeddings) has none: there "
                "too it is mode='manual', or estimator='hutchinson'"
            )
        if tensor is output and tensor.ndim == 0:
            raise RuntimeError(
                f"{name} returns its loss, one number, and labels cannot be drawn from that. Let it return "
                "the logits as well (a mapping or an object with logits, or a tuple), or use "
                "estimator='hutchinson', which needs the loss alone"
            )
        if is_dtensor(tensor):
            raise RuntimeError(
                f"the logits of {name} are a DTensor, split over tensor-parallel ranks: "
                "labels are drawn from whole rows. Give the output layer output_layouts=Replicate() and "
                "use_local_output=True"
            )


class _Listener:
    """Reads from the gradient of the logits which predictions count. Weak: it must not keep the recording, or
    the graph, alive.
    """

    def __init__(self, outputs: Outputs, recorder: Recorder) -> None:
        self._outputs, self._recorder = weakref.ref(outputs), weakref.ref(recorder)

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        outputs, recorder = self._outputs(), self._recorder()
        if outputs is None or recorder is None or gradient is None:
            return  # a compiled graph with the loss inside gives no gradient to the logits
        gradient = own_gradient(outputs, gradient, always=recorder.named)
        counted = outputs.head.likelihood.counted(gradient)
        if outputs.shared:
            outputs.unread = True
            outputs.mask = counted if outputs.mask is None else outputs.mask | counted
            return
        turned = -gradient if recorder.maximize else gradient
        reading = read(outputs, turned, counted)
        if reading.problem is not None:
            outputs.problems.append(reading.problem)
        outputs.take(reading)
        outputs.mask = counted if outputs.mask is None else outputs.mask | counted


def _viewed(view: Tensor, returned: Iterable[Tensor]) -> Tensor | None:
    """The returned tensor of which ``view`` is made without changing a number."""
    return next((t for t in returned if t.requires_grad and is_view_of(view, t)), None)


class _OfLoss:
    """Notes the factor of the returned loss in the one that is trained. Weak, as above."""

    def __init__(self, recording: Recording) -> None:
        self._recording = weakref.ref(recording)

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        recording = self._recording()
        if recording is not None and gradient is not None:
            so_far = recording.loss_gradient
            recording.loss_gradient = gradient.detach().clone() if so_far is None else so_far + gradient


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_copied(item) for item in value)
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return value
