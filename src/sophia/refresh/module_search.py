"""Search for the module whose forwards are recorded, among those that own the parameters.

Wrappers own what the model inside of them owns, and so may a part of a model (a backbone whose embeddings are
the head too). Which of them the loop calls shows when it calls: a forward that is no part of another owner's
is that of the outermost module called. Hooks wait for it on all of them, and are off those inside while it
runs, so that no compiler meets one. If several are called before the first refresh, the backward decides: the
forwards that it came through are those that were trained.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sophia.distributed.wrappers import runs_a_method, unwrapped
from sophia.refresh.hook import Hook
from sophia.refresh.owners import name_of
from sophia.refresh.recorder import Recorder, may_be_trained
from sophia.refresh.refusals import BY_HAND

__all__ = ["Search"]


class Search:
    """Waits on modules, which it does not keep alive.

    Args:
        owners: of the parameters, from the outermost to the innermost.
        found: a method that is told, before the forward, which module is called with what; held weakly.
    """

    def __init__(
        self,
        owners: Sequence[nn.Module],
        found: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None],
    ) -> None:
        self._found: Any = weakref.WeakMethod(found)
        self._owners = [weakref.ref(owner) for owner in owners]
        self._names = [name_of(owner) for owner in owners]
        self._called = False
        self._group: Any = None  # of processes, of the module called last
        self._left: list[tuple[Recorder, Any]] = []
        self._trained: list[str] = []
        self._handles: dict[int, tuple[RemovableHandle, RemovableHandle]] = {}
        self._put_on(owners)
        # An optimizer that is thrown away leaves nothing that a compiler would stumble over.
        weakref.finalize(self, _take_off, self._handles).atexit = False

    def _put_on(self, owners: Sequence[nn.Module]) -> None:
        for owner in owners:
            if id(owner) not in self._handles:
                self._handles[id(owner)] = (
                    owner.register_forward_pre_hook(Hook(self, "before"), with_kwargs=True),
                    owner.register_forward_hook(Hook(self, "after"), with_kwargs=True),
                )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook on an owner."""
        found, inner = self._found(), unwrapped(module)[0]
        # Lightning leads its training_step through a wrapper in this way; what that calls will be found.
        if found is None or runs_a_method(inner):
            return
        if self._called and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing runs a part again
        _take_off(self._handles, [id(inside) for inside in module.modules() if inside is not module])
        if may_be_trained(inner):
            self._called = True
            found(module, args, kwargs)

    def after(self, module: nn.Module, *_: Any) -> None:
        """Forward hook on an owner: those inside may be called alone next time."""
        alive = [owner for ref in self._owners if (owner := ref()) is not None]
        if self._handles:
            self._put_on(alive)

    def exchange(self, recorder: Recorder | None, model: nn.Module, group: Any) -> Recorder | None:
        """Leave ``recorder``, as ``model`` was called outside of its module; the recorder that was left
        before for ``model``, if there is one.
        """
        earlier = next((left for left, _ in self._left if left.model is model), None)
        self._left = [left for left in self._left if left[0] is not earlier]
        if recorder is not None:
            recorder.unhook()
            self._left.append((recorder, self._group))
        self._group = group
        return earlier

    def trained(self, recorder: Recorder) -> tuple[Recorder, Any]:
        """The recorder whose forwards a backward came through, and its module's group of processes: this one,
        if it came through several, or through none.
        """
        trained = [each for each in (*self._left, (recorder, self._group)) if each[0].counts()]
        self._trained = [name_of(each.model) for each, _ in trained]
        return trained[0] if len(trained) == 1 else (recorder, self._group)

    def check(self) -> None:
        """Raise RuntimeError unless the trained forwards are those of one module, and were seen."""
        if len(self._trained) > 1:
            raise RuntimeError(
                f"training forwards of {' and '.join(self._trained)} were seen before the first refresh, "
                "each outside of the other, and each of these modules owns all parameters of the optimizer: "
                "forwards of which of them are to be run again is not known. Pass the one that every "
                "training forward goes through, Sophia(model, ...) or opt.attach(model); or take "
                "mode='manual'"
            )
        if not self._called:
            raise RuntimeError(
                f"a Hessian refresh is due, but no module that owns the parameters ({self}) ran a forward "
                "with gradients on. Hooks see the call model(...), and not one of another method, or one "
                "that a class has overridden (__call__, as GPyTorch does). Call model(...), or use "
                "mode='manual'. Modules made after the optimizer are not looked at: pass them to "
                f"opt.attach(module). {BY_HAND}"
            )

    def stand_in(self) -> nn.Module | None:
        """A module to ask, where none was called, which ranks train the parameters; None if it is gone."""
        return self._owners[0]()

    def forget(self, *, reached: bool = False) -> None:
        """Drop what was recorded of modules that were left; ``reached``: what a backward came through."""
        for left, _ in self._left:
            left.forget_reached() if reached else left.forget()

    def end(self) -> None:
        """Take all hooks off."""
        _take_off(self._handles)
        self._left.clear()

    def __str__(self) -> str:
        return ", ".join(self._names)


def _take_off(
    handles: dict[int, tuple[RemovableHandle, RemovableHandle]], numbers: Sequence[int] | None = None
) -> None:
    for number in tuple(handles) if numbers is None else numbers:
        for handle in handles.pop(number, ()):
            handle.remove()
