"""Replays outside of the user's compiled graphs, where they would spend his recompilations."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["eager"]


@contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled modules and functions run as they were written.

    A part of the rows has a shape that the training never has. A model compiled with ``dynamic=False`` would
    be compiled for it once more, and each of these counts against ``torch._dynamo.config.recompile_limit``:
    over it, the user's own forwards are no longer compiled, or raise with ``fullgraph=True``.

    Does nothing where nothing was compiled.
    """
    # Asked of the loaded modules: to import the compiler takes seconds.
    compiler: Any = sys.modules.get("torch._dynamo")
    if compiler is None:
        yield
        return
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield
