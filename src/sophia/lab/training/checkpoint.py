"""Checkpoints of a run: written whole or not at all, checked when read, the one before kept as a fall-back.

A file is a mark, the SHA-256 of the payload, and the payload as torch writes it. It is read with
``weights_only=True`` and in no other way: tensors, numbers and strings come out, never code, whoever the file
is from.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import warnings
from pathlib import Path
from typing import Any

import torch

from sophia.lab.support.errors import LabError
from sophia.lab.support.files import write_atomically

__all__ = ["DamagedCheckpoint", "exists", "load", "random_state", "readable", "restore_random_state", "save"]

State = dict[str, Any]

_MARK = b"SOPHIA01"
_CURRENT, _PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


class DamagedCheckpoint(UserWarning):
    """Warning: a checkpoint could not be read, and an older one is used."""


def save(folder: Path, state: State) -> None:
    """Save; the last checkpoint becomes the previous one. A crash at any point leaves a readable one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    current = folder / _CURRENT

    def write(file: Any) -> None:
        file.write(_MARK + hashlib.sha256(payload).digest() + payload)

    # The new one gets a name of its own first: if the disk is full, both old ones stay as they are. Between
    # the two renames the previous one alone has a name that is read, and it is whole.
    fresh = folder / "checkpoint-new.pt"
    write_atomically(fresh, write)
    if current.exists():
        os.replace(current, folder / _PREVIOUS)
    os.replace(fresh, current)


def exists(folder: Path) -> bool:
    """Whether anything was ever saved here."""
    return any((folder / name).exists() for name in (_CURRENT, _PREVIOUS))


def load(folder: Path) -> State | None:
    """The newest readable state, or None if nothing was ever saved.

    Damage of the newest is a ``DamagedCheckpoint`` warning; damage of all is a ``LabError``.
    """
    damage: list[str] = []
    for name in (_CURRENT, _PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        state, reason = _read(path)
        if state is not None:
            if damage:
                warnings.warn(
                    f"{damage[0]}; going on from {name}, {state.get('step', '?')} steps into the run.",
                    DamagedCheckpoint,
                    stacklevel=2,
                )
            return state
        damage.append(f"{name} of the run {folder.name} is damaged ({reason})")
    if damage:
        raise LabError(
            f"{' and '.join(damage)}, so the run cannot go on from where it was. "
            f"Delete the folder {folder.name} to start it again."
        )
    return None


def readable(folder: Path) -> list[State]:
    """Every state that is there and whole, the newest first."""
    paths = [folder / name for name in (_CURRENT, _PREVIOUS)]
    return [state for path in paths if path.exists() and (state := _read(path)[0]) is not None]


def _read(path: Path) -> tuple[State | None, str]:
    data = path.read_bytes()
    head = len(_MARK) + 32
    if len(data) < head or not data.startswith(_MARK):
        return None, f"{len(data)} bytes without the mark of a checkpoint"
    if hashlib.sha256(data[head:]).digest() != data[len(_MARK) : head]:
        return None, "its SHA-256 does not fit"
    try:
        state = torch.load(io.BytesIO(data[head:]), map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds; with a good checksum it is another's file, or another version's
        return None, f"torch refuses it: {type(error).__name__}"
    return (state, "") if isinstance(state, dict) else (None, "it holds no dictionary")


def random_state() -> State:
    """The global random states as tensors and plain integers, which ``weights_only`` lets through."""
    version, numbers, gauss = random.getstate()
    state: State = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: State) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
