"""Memory that the C library hands back to the system at each ``free``, and asks for again at the next step.

A training step frees and takes the same large tensors again and again. By default glibc returns those of some
megabytes to the system, which clears every page before it gives it out anew: on a small model a
good part of the processor time of a step.
"""

from __future__ import annotations

import ctypes
import functools
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""``mallopt`` of glibc, by the names in its ``malloc.h``."""
_ONE_GIB, _64_MIB, _32_MIB = 1 << 30, 1 << 26, 1 << 25


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep what this process frees for its next tensors; no number changes.

    Returns:
        Whether it was told; False under another C library, which is left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # musl has a mallopt in name alone, which answers 0; glibc before 2.35 takes 32 MiB at most. Without a
    # threshold of ours the other two calls would freeze it where it is, perhaps at 128 KiB.
    taken = [mallopt(_MMAP_THRESHOLD, value) == 1 for value in (_32_MIB, _ONE_GIB)]
    if not any(taken):
        return False
    return all([mallopt(_TRIM_THRESHOLD, _ONE_GIB) == 1, mallopt(_TOP_PAD, _64_MIB) == 1])
