"""The global random generators of torch, Python and NumPy, at one moment."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Noise", "cuda_devices"]


def cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    """Numbers of the CUDA devices on which the tensors are."""
    return sorted({t.device.index for t in tensors if t.device.type == "cuda"})


class Noise:
    """Their states.

    Args:
        devices: numbers of CUDA devices; the processor's generator is always among them.
    """

    def __init__(self, devices: Iterable[int] = ()) -> None:
        self._python = random.getstate()
        # Only if somebody imported it: torch does not need it.
        numpy: Any = sys.modules.get("numpy.random")
        self._numpy = None if numpy is None else numpy.get_state()
        self._torch = torch.default_generator.get_state()
        self._cuda = {number: torch.cuda.default_generators[number].get_state() for number in devices}

    def restore(self) -> None:
        """Set the generators to it."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)
        torch.default_generator.set_state(self._torch)
        for number, state in self._cuda.items():
            torch.cuda.default_generators[number].set_state(state)
