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

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sophia.likelihoods import Heads, Likelihood, heads_of
from sophia.refresh.arrivals import Arrivals
from sophia.refresh.asked_outputs import AskedOutputs
from sophia.refresh.computed import Computed
from sophia.refresh.computed_reading import read_computed
from sophia.refresh.conditions import Witnesses
from sophia.refresh.hidden_reading import OfHidden, output_of
from sophia.refresh.hook import Hook
from sophia.refresh.listeners import Keeper, OfLoss, OfOutput
from sophia.refresh.loss_graph import LossGraph, found_inside, is_compiled, is_made_of_losses, other_losses
from sophia.refresh.model_outputs import find_logits, find_loss, tensors_in
from sophia.refresh.other_outputs import OtherOutputs
from sophia.refresh.output_layer import BeforeTheHead, Catch, may_be_found_later
from sophia.refresh.places import at, fields, places_in
from sophia.refresh.recording import Autocast, Outputs, Recording, trained
from sophia.refresh.sampled_reading import take_probes
from sophia.refresh.sandbox import in_sandbox
from sophia.refresh.views import Through, viewed

__all__ = ["Autocast", "Outputs", "Recorder", "Recording", "may_be_trained"]


def may_be_trained(model: nn.Module) -> bool:
    """Whether a forward of ``model`` that begins now may be one of a training step, in either mode."""
    if in_sandbox() or not torch.is_grad_enabled():
        return False
    if torch._C._is_tracing() or torch.compiler.is_compiling():  # the forward of an export
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # inside torch.func (vmap, grad, hessian) there is no .grad, and no step follows
    if model.training and getattr(model, "_is_replica", False):
        raise RuntimeError(
            f"{type(model).__name__} runs inside torch.nn.DataParallel, which gives each device a copy "
            "of the model and a part of the batch: their forwards cannot be run again on this one. Start "
            "one process a device (torchrun, DistributedDataParallel), or show one device to this one"
        )
    # All frozen, as a discriminator in its generator's step: then the loss is not about it.
    return any(p.requires_grad for p in model.parameters())


class Recorder:
    """Keeps the training forwards of ``model`` while ``active``.

    Args:
        model: the module that is really called in the loop and returns logits.
        likelihood: says what a prediction is, and how to see from a gradient whether it counted.
        logits_fn: ``logits_fn(output) -> Tensor``, for models whose logits are not found; a mapping by name
            for several heads.
        mask_fn: ``mask_fn(args, kwargs, output) -> bool mask``, or weights in a mean, for losses whose
            gradient does not tell; a mapping by name for several heads.
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
        self.asked = AskedOutputs(type(model).__name__, self.heads, self.named, logits_fn)
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
        self.layer: BeforeTheHead | None = None
        """Where the predictions were, once they had to be found before the output layer."""
        self.compiled = False
        """Whether a compiled graph was seen in the model, which a hook inside would break."""
        self._catch: Catch | None = None
        self.hidden_width: int | None = None
        """Width of the hidden states that the model returns, once the loss was seen to make its logits of
        them.
        """
        self._handles: list[RemovableHandle] = []
        self.hook()

    def hook(self) -> None:
        """Put the hooks on the model, unless they are on."""
        if not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(Hook(self, "before"), with_kwargs=True),
                self.model.register_forward_hook(Hook(self, "after"), with_kwargs=True),
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
        if self.layer is not None:
            self.layer.states.forget()
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
        in training mode that was not recorded, whether it came.
        """
        self.arrivals.drop_thrown_away()
        return self.unrecorded or any(recording.reached for recording in self.recordings)

    def weights_are_equal(self) -> bool:
        """Whether the weights of all predictions of the step were read, and each forward has one for all; or
        no gradient came of which they could be.
        """
        parts = [part for r in trained(self.recordings) if r.reached for part in r.outputs]
        read = all(p.mask is None or (p.weights is not None and not p.unread) for p in parts)
        return bool(parts) and read and all(part.equal for part in parts)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: note the inputs before the model can change them."""
        if not may_be_trained(model):
            return
        if not self.active:
            self.unrecorded |= model.training
            return
        self.arrivals.tidy()
        for recording in self.recordings:
            if recording.reached:
                read_computed(self, recording)
        if self.copy_inputs:
            args, kwargs = _copied(args), _copied(kwargs)
        self._pending = (args, dict(kwargs), self.witnesses.before(model, args, kwargs))
        self._caught()
        if self.layer is not None and self.layer.maker is not None and not self.compiled:
            self._catch = Catch(self.layer.maker)

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook: find the logits and listen to their gradient."""
        if self._pending is None or in_sandbox():
            return
        (args, kwargs, noted), self._pending = self._pending, None  # type: ignore[assignment]
        hidden = self._caught()
        device_type = next((p.device.type for p in model.parameters()), "cpu")
        conditions = self.witnesses.after(model, noted, tensors_in(fields(output)))
        recording = Recording(args, kwargs, Autocast.now(device_type), (), conditions)
        recording.versions = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        recording.evaluation = not model.training
        try:
            if not self._is_loss_alone(output):
                self._listen(recording, output, hidden)
        except Exception as error:
            if model.training:
                raise
            # What a model returns in a validation may be something else; it matters if that is trained.
            recording.refused = error
        self.arrivals.listen(recording, tensors_in(fields(output)))
        self.recordings.append(recording)

    def _caught(self) -> Tensor | None:
        """The hidden states of the forward that has just run, if they were looked for."""
        catch, self._catch = self._catch, None
        return None if catch is None else catch.end()

    def _listen(self, recording: Recording, output: Any, hidden: Tensor | None) -> None:
        if self._keeps_to_itself(output):
            states = find_logits(output)
            if states is not None and states.shape[-1:] == (self.hidden_width,):
                hidden = states
            if self.layer is not None and hidden is not None and hidden.ndim == self.layer.form[1]:
                self._listen_before(recording, self.layer, hidden)
            else:
                self._listen_inside(recording, output)
            return
        found = self.find_outputs(output)
        returned = {id(tensor): tensor for tensor in tensors_in(fields(output))}
        recording.outputs = tuple(
            Outputs(head, tensor.shape, id(tensor) in returned)
            for head, tensor in zip(self.heads, found, strict=True)
        )
        self.other_outputs.listen(recording, output, found)
        if self.mask_fn is not None:
            masks = self.asked.by_head(self.mask_fn(recording.args, recording.kwargs, output), "mask_fn")
            for part, mask in zip(recording.outputs, masks, strict=True):
                part.state(mask)
            return
        bases = [
            None if p.returned else viewed(t, returned.values())
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
                listener: Any = OfOutput(part, self)
                if base is not None:
                    tensor, listener = base, Through(tensor, base, listener)
                tensor.register_hook(listener)  # type: ignore[no-untyped-call]
        loss = find_loss(output)
        if loss is not None and loss.ndim == 0 and loss.requires_grad:
            loss.register_hook(OfLoss(recording))  # type: ignore[no-untyped-call]
            recording.loss_place = next((place for place, t in places_in(output) if t is loss), None)

    def _is_loss_alone(self, output: Any) -> bool:
        """Whether the estimator finds its loss in an output that has nothing else to offer."""
        if self.needs_outputs or self.logits_fn is not None or self.mask_fn is not None or self.named:
            return False
        logits = find_logits(output)
        return not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim)

    def _keeps_to_itself(self, output: Any) -> bool:
        """Whether the predictions are nowhere in an output: a loss alone, one for each example, or hidden
        states whose output layer the loss was seen to use.
        """
        if self.logits_fn is not None or self.named:
            return False
        found, classes = find_logits(output), bool(self.heads[0].likelihood.event_dims)
        detached = isinstance(found, Tensor) and not found.requires_grad  # to be looked at, and not trained
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim == 0 or detached:
            return any(t.requires_grad for t in tensors_in(fields(output)))
        return classes and (found.shape[-1] == self.hidden_width or is_made_of_losses(found))

    def _listen_before(self, recording: Recording, source: BeforeTheHead, hidden: Tensor) -> None:
        """Listen to the hidden states of which the predictions were seen to be made."""
        part = output_of(self.heads[0], source.layer, hidden.shape)
        recording.outputs, recording.source = (part,), source
        read = OfHidden(part, source.layer, hidden.detach(), sample=self.sample, maximize=self.maximize)
        hidden.register_hook(read)  # type: ignore[no-untyped-call]

    def _listen_inside(self, recording: Recording, output: Any) -> None:
        """Listen to predictions that the graph of the output shows; where it shows none, keep the gradients
        that come to the output, of which the step finds out (``unseen.py``).
        """
        head = self.heads[0]
        returned = list(places_in(output))
        inside = found_inside([t for _, t in returned], head)
        if inside:
            recording.other_losses = other_losses((t for _, t in returned), head)
            recording.source = LossGraph(head)
            recording.outputs = tuple(Outputs(head, each.values.shape, True) for each in inside)
            if self.mask_fn is not None:
                if len(inside) > 1:
                    raise RuntimeError(
                        f"the loss of {type(self.model).__name__} is made of {len(inside)} tensors of "
                        "logits, and mask_fn= speaks of one: leave it out, as the gradient tells what counts"
                    )
                recording.outputs[0].state(self.mask_fn(recording.args, recording.kwargs, output))
                return
            for part, each in zip(recording.outputs, inside, strict=True):
                take_probes(part, each.values, self.sample)
                each.listen(OfOutput(part, self))
            return
        self.compiled = is_compiled(t for _, t in returned)
        if not may_be_found_later(self.model, output):
            self.find_outputs(output)  # which says what is missing
        for place, tensor in returned:
            if tensor.requires_grad:
                tensor.register_hook(Keeper(recording, place))  # type: ignore[no-untyped-call]

    def outputs_of(self, recording: Recording, output: Any) -> tuple[Any, ...]:
        """The tensors in ``output`` that stand where those of a recording stood."""
        if not recording.outputs:
            return ()
        if recording.source is not None:
            with recording.autocast.again():
                return recording.source.find(output)
        more = (at(output, part.place) for part in recording.outputs if part.place is not None)
        return (*self.find_outputs(output), *more)

    def find_outputs(self, output: Any) -> tuple[Tensor, ...]:
        """The outputs that the likelihood speaks of, one for each head; RuntimeError if one is not there."""
        return self.asked.find(output)


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
