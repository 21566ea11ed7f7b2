"""Search for the module whose forwards are recorded, among those that own the parameters.

Wrappers own what the model inside of them owns, and so may a part of a model (a backbone whose embeddings are
the head too). Which of them the loop calls shows when it calls: the first training forward that is no part of
another's is that of the outermost module called. Hooks wait for it on all of them, and are taken off those
inside it before they run, so that no compiler sees one. If another is called before the first refresh, the
backward decides: the forwards that it came through are those that were trained.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sophia.distributed.wrappers import runs_a_method, unwrapped
from sophia.refresh.hook import Hook
from sophia.refresh.owners import name_of
from sophia.refresh.recorder import Recorder, is_training_forward
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
        self._names = [name_of(owner) for owner in owners]
        self._outermost = weakref.ref(owners[0])
        self._called = False
        self._trained: list[str] = []
        self._left: list[Recorder] = []
        self._handles = {
            id(owner): owner.register_forward_pre_hook(Hook(self, "called"), with_kwargs=True)
            for owner in owners
        }
        # An optimizer that is thrown away leaves nothing that a compiler would stumble over.
        weakref.finalize(self, _remove, self._handles).atexit = False

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook on an owner."""
        found, inner = self._found(), unwrapped(module)[0]
        # Lightning leads its training_step through a wrapper in this way; what that calls will be found.
        if found is None or runs_a_method(inner) or not is_training_forward(inner):
            return
        for inside in module.modules():
            if (handle := self._handles.pop(id(inside), None)) is not None:
                handle.remove()
        self._called = True
        found(module, args, kwargs)

    def leave(self, recorder: Recorder) -> None:
        """Another module was called outside of the one that ``recorder`` is for: it records no more."""
        recorder.unhook()
        self._left.append(recorder)

    def look(self) -> None:
        """Note which of the modules that were left were trained in this step, before ``.grad`` is put
        aside.
        """
        self._trained = [name_of(left.model) for left in self._left if left.counts()]

    def check(self, recorder: Recorder) -> None:
        """Raise RuntimeError unless the trained forwards are those of one module, and were recorded."""
        if self._trained:
            both = " and ".join((*self._trained, name_of(recorder.model)))
            raise RuntimeError(
                f"training forwards of {both} were seen before the first refresh, each outside of the other, "
                "and each of these modules owns all parameters of the optimizer: forwards of which of them "
                "are to be run again is not known. Pass the one that every training forward goes through, "
                "Sophia(model, ...) or opt.attach(model); or take mode='manual'"
            )
        if not self._called:
            raise RuntimeError(
                f"a Hessian refresh is due, but no module that owns the parameters ({self}) ran a forward in "
                "training mode. Hooks see the call model(...), and not one of another method, or one that a "
                "class has overridden (__call__, as GPyTorch does). Call model.train() and model(...), or "
                "use mode='manual'. Modules made after the optimizer are not looked at: pass them to "
                f"opt.attach(module). {BY_HAND}"
            )

    def stand_in(self) -> nn.Module | None:
        """A module to ask, where none was called, which ranks train the parameters; None if all are gone."""
        return self._outermost()

    def forget(self, *, reached: bool = False) -> None:
        """Drop what was recorded of modules that were left; ``reached``: what a backward came through."""
        for left in self._left:
            left.forget_reached() if reached else left.forget()

    def end(self) -> None:
        """Take all hooks off."""
        _remove(self._handles)
        self._left.clear()

    def __str__(self) -> str:
        return ", ".join(self._names)


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
