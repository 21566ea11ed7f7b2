"""The forward hooks on the attached model, which copies, pickles and scripts of it must survive."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable, without its imports

__all__ = ["Hook"]

_NO_SCRIPT = (
    "torch.jit.script compiles the hooks of a module too, and Sophia's cannot be compiled: they record the "
    "training forwards. Call opt.detach() first, and opt.attach(model) to train on; torch.jit.trace and "
    "torch.export with strict=False need no detach()"
)


class Hook:
    """A hook that forgets its recorder: the model does not keep the optimizer alive, and copies of it do
    nothing.
    """

    def __init__(self, recorder: Any, moment: str) -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)
        self._moment = moment

    @untraced
    def __call__(self, *arguments: Any) -> None:
        recorder = None if self._recorder is None else self._recorder()
        if recorder is not None:
            getattr(recorder, self._moment)(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None, self._moment)

    @property
    def __name__(self) -> str:
        # torch.jit.script asks for it before it compiles a hook, and tells the user what is raised.
        raise AttributeError(_NO_SCRIPT)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled model must load where this library is not installed, so its hooks become a method of the
        # standard library that takes anything and does nothing.
        return getattr, (nullcontext(), "__exit__")
