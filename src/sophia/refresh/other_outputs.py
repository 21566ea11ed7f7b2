"""What a model returns beside what its heads speak of: a second head, the next chunk, a value.

All returned tensors are listened to, but for those that the logits are made of or that are made of the
logits (``graph_search.py``): a gradient that reaches one of the others is a part of the loss of its own.
Where its weights can be read as those of the logits are, it holds predictions of the same kind, and joins
them. Where not, the loss has a part that this likelihood is not about, and the step ends with an error that
says how ``Heads`` are written for it. Where the user has said himself which outputs count (``Heads``,
``logits_fn``, ``mask_fn``), one that is outside of them is named once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports
from torch.utils.weak import TensorWeakRef

from sophia.checks import SophiaWarning
from sophia.likelihoods import Categorical, Head
from sophia.refresh.graph_search import Kin, kin_of
from sophia.refresh.model_outputs import tensors_in
from sophia.refresh.places import Place, places_in, written
from sophia.refresh.recording import Other, Outputs, Recording
from sophia.refresh.views import forget, is_view_of, less_views, listen

__all__ = ["OtherOutputs", "own_gradient"]


class OtherOutputs:
    """Finds the outputs beside those of the heads, and says at the step what they are.

    Args:
        model: its name, for errors.
        asked: whether they may join the one head; else the user has said which outputs count.
        named: whether the outputs of the heads were given by name, so that their gradients are told apart
            where one is a view of another.
        silent: whether the estimator takes the loss as it is, and no word is needed.
    """

    def __init__(self, model: str, *, asked: bool, named: bool, silent: bool = False) -> None:
        self.model, self.asked, self.named, self.silent = model, asked, named, silent
        self._kin: dict[Hashable, list[Kin]] = {}  # by what is returned, how it hangs together
        self._joined: set[Place] = set()  # places that were of the head's kind once
        self._said = False

    def listen(self, recording: Recording, output: Any, found: Sequence[Tensor]) -> None:
        """Listen to all tensors of ``output`` that the loss may use beside ``found``."""
        if self.named:
            self._tell_views_apart(recording, found)
        places = list(places_in(output))
        if places and places[0][0] == ():
            return  # the output is one tensor
        mine = {id(t) for t in found}
        recording.first = next((place for place, t in places if id(t) in mine), None)
        if recording.first is not None:
            recording.name = written(output, recording.first)
        others = [(place, t) for place, t in places if id(t) not in mine and _may_be_used(t)]
        if not others or not any(t.grad_fn is not None for t in found):
            return
        # Once for each kind of output: the graph of a large model has thousands of nodes.
        key = tuple((place, t.ndim, _kind(t)) for place, t in others), tuple(map(_kind, found))
        if key not in self._kin:
            self._kin[key] = kin_of(found, [t for _, t in others])
        for (place, tensor), kin in zip(others, self._kin[key], strict=True):
            head = recording.outputs[0].head
            of_view = self.asked and kin.below == (0,) and is_view_of(tensor, found[0])
            if kin.above or (kin.below and not of_view):
                continue
            part = Outputs(head, tensor.shape, True, place, name=written(output, place))
            if self.asked and _fits(tensor, head):
                part.probes = head.likelihood.probes(tensor)
            other = Other(part, part.name, kin, TensorWeakRef(tensor), self.asked, of_view)
            if of_view:
                recording.outputs[0].views.append(listen(tensor, found[0]))
            tensor.register_hook(_Listener(other))  # type: ignore[no-untyped-call]
            recording.others.append(other)

    @staticmethod
    def _tell_views_apart(recording: Recording, found: Sequence[Tensor]) -> None:
        for i, (part, tensor) in enumerate(zip(recording.outputs, found, strict=True)):
            views = [(j, t) for j, t in enumerate(found) if j != i and is_view_of(t, tensor)]
            views = [(j, t) for j, t in views if t.grad_fn is not None and tensor.grad_fn is not None]
            for kin, (j, view) in zip(kin_of([tensor], [t for _, t in views]), views, strict=True):
                if kin.below:
                    part.views.append(listen(view, tensor))
                    recording.pairs.append((i, j))

    def settle(self, recordings: Sequence[Recording]) -> None:
        """Let those join that the loss used, before a refresh; RuntimeError where one is of another kind."""
        fed = {id(t) for r in recordings for t in tensors_in((r.args, r.kwargs)) if t.grad_fn is not None}
        joining: list[list[Other]] = []
        for recording in recordings:
            self._check_views(recording)
            # An output that went into the model again is no output of the loss: its gradient is that of
            # the later forward.
            used = [other for other in recording.others if other.reached and not _is_among(fed, other)]
            if used and not self.asked:
                self._say_once(_outside(used, self.model))
            if not used and recording.reached:
                self._say_if_parts_of_another(recording)
            joining.append(self._joining(recording, used) if self.asked else [])
        for recording, taken in zip(recordings, joining, strict=True):  # after all errors
            self._joined.update(other.part.place for other in taken if other.part.place is not None)
            recording.outputs = (*recording.outputs, *(other.part for other in taken))
            recording.others = []

    def _joining(self, recording: Recording, used: Sequence[Other]) -> list[Other]:
        numbers = {id(other): number for number, other in enumerate(recording.others)}
        taken: list[Other] = []
        for other in used:
            if self._is_of_the_kind(recording, other) and not any(
                _are_kin(numbers, other, one) for one in taken
            ):
                taken.append(other)
        for other in used:
            # What others are made of, or what is made of them, got its gradient through them.
            through = any(_are_kin(numbers, other, one) for one in taken) or any(
                numbers[id(one)] in other.kin.parts for one in used
            )
            known = self.silent or through or other.of_view or other.part.place in self._joined
            # A first output that is no logits at all is spoken of instead (``misread.py``).
            known |= any(problem.nonsense for problem in recording.outputs[0].problems)
            if other.unlike and not known and not self._cannot_tell(recording, other):
                raise RuntimeError(_another_kind(self.model, recording, other, used))
        return taken

    @staticmethod
    def _cannot_tell(recording: Recording, other: Other) -> bool:
        """Whether it leaves a compiled graph that has the loss inside."""
        return other.kin.hidden and recording.outputs[0].mask is None

    def _is_of_the_kind(self, recording: Recording, other: Other) -> bool:
        first = recording.outputs[0]
        if self._cannot_tell(recording, other):
            return False
        if other.of_view and not first.apart:
            return False  # its gradient is in that of the first, which could be read
        read = other.part.weights is not None and not other.part.unread
        return other.part.mask is not None and (read or other.part.place in self._joined)

    def _check_views(self, recording: Recording) -> None:
        for i, j in recording.pairs:
            for used, left in ((i, j), (j, i)):
                part, other = recording.outputs[used], recording.outputs[left]
                nothing = other.mask is None or not bool(other.mask.any())
                if part.mask is not None and part.unread and nothing and not self.silent:
                    one, two = part.head.name, other.head.name
                    raise RuntimeError(
                        f"the outputs {one!r} and {two!r} of {self.model} are one tensor and its transpose, "
                        f"or another view. The loss uses {one!r} alone, and its gradient is not that of one "
                        "loss: if it is that of both directions, they cannot be told apart in it. Use the "
                        f"output {two!r} itself for its direction, outside of the model: for instance "
                        f"(cross_entropy(output[{one!r}], y) + cross_entropy(output[{two!r}], y)) / 2"
                    )

    def _say_if_parts_of_another(self, recording: Recording) -> None:
        """Warn where the model makes its loss of a tensor that it returns in parts: none has a gradient."""
        first = recording.outputs[0] if recording.outputs else None
        if not self.asked or first is None or first.mask is not None or recording.first is None:
            return
        alike = [o for o in recording.others if o.part.shape[-1:] == first.shape[-1:] and not o.kin.hidden]
        if not alike or len(first.shape) < 2:
            return
        names = " and ".join(f"{o.name} of shape {tuple(o.part.shape)}" for o in alike[:3])
        self._say_once(
            f"no gradient reached {recording.name} of shape {tuple(first.shape)} of {self.model}, nor "
            f"{names}: the loss is made inside the model of something else, and h is that of "
            f"{recording.name} alone. If the loss is that of the others too, compute it outside of the "
            f"model from these outputs; if not, logits_fn=lambda output: {recording.name} says so"
        )

    def _say_once(self, message: str) -> None:
        if not (self._said or self.silent):
            self._said = True
            warnings.warn(message, SophiaWarning)


def _outside(used: Sequence[Other], model: str) -> str:
    names = ", ".join(f"{other.name} of shape {tuple(other.part.shape)}" for other in used[:3])
    return (
        f"the loss has a gradient in {names} of {model}, beside the outputs that Heads, logits_fn= or "
        "mask_fn= speak of: that part of the loss is not in h, and parameters that only it reaches move by "
        "sign momentum. Give it a head in Heads, or leave it so if it is a penalty, which has no likelihood"
    )


def _another_kind(model: str, recording: Recording, wrong: Other, used: Sequence[Other]) -> str:
    first = recording.outputs[0]
    mine = f"{type(first.head.likelihood).__name__}()"
    parts = [
        (recording.first, recording.name, mine),
        *((o.part.place, o.name, o.likelihood if o.unlike else mine) for o in used),
    ]
    named = all(place and len(place) == 1 and isinstance(place[0], str) for place, _, _ in parts)
    keys = [str(place[0]) if named and place else f"output_{i}" for i, (place, _, _) in enumerate(parts)]
    heads = ", ".join(f'"{key}": {what}' for key, (_, _, what) in zip(keys, parts, strict=True))
    finds = ", ".join(f'"{key}": {name}' for key, (_, name, _) in zip(keys, parts, strict=True))
    return (
        f"the loss has a gradient in {wrong.name} of shape {tuple(wrong.part.shape)} of {model}, "
        f"beside {recording.name} of shape {tuple(first.shape)}, and it is not that of a {mine[:-2]} "
        "loss, or its weights cannot be read: h would leave that part of the loss out. Say what each "
        f"output is: likelihood=Heads({{{heads}}})"
        + ("" if named else f", logits_fn=lambda output: {{{finds}}}")
        + ", from sophia.likelihoods (Gaussian for a squared error, Bernoulli for yes or no, Categorical "
        "for classes; weights= for the factors of the losses). If it is a penalty and no prediction: "
        f"logits_fn=lambda output: {recording.name}, which leaves it out of h"
    )


class _Listener:
    """Reads what a gradient in an output says of it. Weak: it must not keep the recording alive."""

    def __init__(self, other: Other) -> None:
        self._other = weakref.ref(other)

    @untraced
    def __call__(self, gradient: Tensor | None) -> None:
        other = self._other()
        if other is None or gradient is None:
            return
        part = other.part
        if not other.asked or not _fits(gradient, part.head):
            # Zeros come through what a loss leaves out, a chunk of which no position counts.
            other.reached |= bool(gradient.any())
            other.unlike |= other.reached
            return
        likelihood = part.head.likelihood
        counted = likelihood.counted(gradient)
        if not bool(counted.any()):
            return
        other.reached = True
        reading = likelihood.weights(gradient, part.probes, counted)
        weights = reading.weights
        if weights is None or not (likelihood.event_dims or _are_regular(weights, gradient)):
            part.unread = True
            if bool(gradient.isfinite().all()):  # an overflow says nothing of the loss
                other.unlike = True
                other.likelihood = _likely(gradient)
        else:
            part.take(reading)
        part.mask = counted if part.mask is None else part.mask | counted


def own_gradient(part: Outputs, gradient: Tensor, *, always: bool) -> Tensor:
    """The gradient in an output of the loss that uses it, less what came through outputs that are views of
    it.

    Args:
        part: the output.
        gradient: all that arrived in it.
        always: take the views off even if the whole can be read as one loss's gradient.
    """
    if not part.views or not any(view.gradients for view in part.views):
        return gradient
    likelihood = part.head.likelihood
    if always or likelihood.weights(gradient, part.probes, likelihood.counted(gradient)).weights is None:
        part.apart = True
        gradient = less_views(gradient, part.views)
    forget(part.views)
    return gradient


def _are_regular(weights: Tensor, gradient: Tensor) -> bool:
    """Whether all numbers of one sign weigh the same. One number alone is of every kind, with some weight:
    only many with one weight speak for a kind, which an output that nobody has named must show.
    """
    ends = [torch.aminmax(weights[of_sign]) for of_sign in (gradient > 0, gradient < 0) if of_sign.any()]
    return all(float(high - low) <= 0.02 * float(high) for low, high in ends)


def _likely(gradient: Tensor) -> str:
    classes = gradient.ndim > 1 and gradient.shape[-1] > 1 and Categorical().mismatch(gradient) < 0.05
    return "Categorical()" if classes else "Gaussian()"


def _fits(tensor: Tensor, head: Head) -> bool:
    """Whether a tensor may hold predictions of that kind: of one class there is no choice."""
    dims = head.likelihood.event_dims
    return tensor.ndim > dims and (not dims or tensor.shape[-1] > 1)


def _may_be_used(tensor: Tensor) -> bool:
    """Whether it is more than one number, and comes out of the graph."""
    return (
        tensor.is_floating_point() and tensor.grad_fn is not None and tensor.ndim > 0 and tensor.shape != (1,)
    )


def _kind(tensor: Tensor) -> Hashable:
    return None if tensor.grad_fn is None else (tensor.grad_fn.name(), tensor.output_nr)


def _is_among(inputs: set[int], other: Other) -> bool:
    tensor = other.tensor()
    return tensor is not None and id(tensor) in inputs


def _are_kin(numbers: dict[int, int], one: Other, two: Other) -> bool:
    """Whether one is made of the other."""
    return numbers[id(one)] in two.kin.parts or numbers[id(two)] in one.kin.parts
