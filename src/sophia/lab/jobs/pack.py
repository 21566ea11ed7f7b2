"""`sophia pack`: the finished runs of a folder as one file, and back.

A crash at any step loses nothing. Packing writes the whole pack under its name, reads it back from the disk,
and only then removes folders; unpacking writes and reads back every folder, and only then removes the pack.
While both are there the pack is what is read, and giving the command again ends what was begun.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sophia.lab.records.pack_file import NAME, pack_of, read_pack
from sophia.lab.records.packed_run import FILES, NotPackable, files_of, pack_line
from sophia.lab.records.reading import MOST_BYTES
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.support.files import checked_name, locked, sync_folder, write_atomically
from sophia.lab.training import checkpoint

__all__ = ["Packed", "pack", "unpack"]

SHOWN = 10
"""Reasons of a refusal that are printed; the rest is counted."""


@dataclass(frozen=True)
class Packed:
    """What packing or unpacking has done."""

    runs: int
    """Runs in the pack, or in folders after unpacking."""
    moved: int
    """Of these, how many were moved by this call."""
    size: int
    """Bytes of the pack."""


Files = Mapping[str, bytes]


def pack(folder: Path) -> Packed:
    """Pack every run of ``folder/runs`` into ``folder/runs.jsonl``, beside those that are there already.

    Raises ``LabError`` that names every run in the way, before anything is changed: a run that has not ended,
    is being written, is damaged, or holds more than a pack gives back.
    """
    runs = _runs_of(folder)
    with locked(folder, what="runs of the folder"):
        for rest in folder.glob(f".{NAME}.*.tmp"):  # of a packing that was killed while it wrote
            os.unlink(rest)
        before = _readable_pack(runs)
        found, reasons = _finished(runs, before)
        _refuse(folder, reasons)
        if not found and not before:
            raise UsageError(
                f"{folder} holds no run: neither a folder in {runs} nor {NAME}. Give the folder of a "
                "comparison, a search, or of `sophia train`: the one in which `runs` lies."
            )
        every = before | {name: files for name, files in found.items() if files}
        if every != before:
            text = "".join(f"{pack_line(name, every[name])}\n" for name in sorted(every))
            if len(text) > MOST_BYTES:
                raise LabError(
                    f"{NAME} would hold {len(text) >> 20} MiB, and no more than {MOST_BYTES >> 20} are read "
                    f"back. Leave these runs in folders."
                )
            _write(pack_of(runs), text.encode())
        if _readable_pack(runs) != every:
            raise LabError(
                f"{pack_of(runs)} does not read back as it was written, so no folder was removed. Look at "
                "the disk, then give the same command again."
            )
        for name in found:
            _remove(runs / name)
        _remove_empty(runs)
        return Packed(len(every), len(found), pack_of(runs).stat().st_size)


def unpack(folder: Path) -> Packed:
    """Write the folder of every run in ``folder/runs.jsonl``, and remove the pack.

    Raises ``LabError`` where a folder holds something else under the name of a run.
    """
    runs = _runs_of(folder)
    if not pack_of(runs).exists():
        if runs.is_dir():
            return Packed(sum(1 for each in runs.iterdir() if each.is_dir()), 0, 0)
        raise UsageError(
            f"{folder} holds no {NAME}, so there is nothing to unpack. Give the folder in which it lies."
        )
    with locked(folder, what="runs of the folder"):
        packed = _readable_pack(runs)
        size = pack_of(runs).stat().st_size
        found = {name: _differs(runs / name, files) for name, files in packed.items()}
        _refuse(folder, [f"runs/{name}: {reason}" for name, reason in found.items() if reason is not None])
        for name, files in packed.items():
            for file, data in files.items():
                _write(runs / name / file, data)
        if any(
            (runs / n / f).read_bytes() != data for n, files in packed.items() for f, data in files.items()
        ):
            raise LabError(
                f"A folder in {runs} does not read back as it was written, so {NAME} was kept. Look at the "
                "disk, then give the same command again."
            )
        os.unlink(pack_of(runs))
        sync_folder(folder)
        return Packed(len(packed), len(packed), size)


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda file: file.write(data))


def _runs_of(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder. Give the folder of a comparison: the one in which `runs` or {NAME} lies."
        )
    runs = folder / "runs"
    if runs.is_symlink():
        raise UsageError(
            f"{runs} is a link, and what lies behind it may be another's. Give the folder in which the runs "
            "themselves lie."
        )
    return runs


def _readable_pack(runs: Path) -> dict[str, Files]:
    """The files of every run in the pack. Raises ``LabError`` for a pack with anything that cannot be
    read.
    """
    path = pack_of(runs)
    found = read_pack(path.parent.resolve(), path)
    problems = list(found.problems)
    packed: dict[str, Files] = {}
    for name, content in found.runs.items():
        try:
            packed[name] = files_of(content)
            pack_line(name, packed[name])  # raises for what is no run, such as a result that is a list
        except (ValueError, RecursionError) as error:
            problems.append(f"run {name}: {error}")
    if problems:
        raise LabError(
            f"{path} is damaged: {'; '.join(problems[:SHOWN])}. So what it holds would be lost. Restore the "
            "file, or delete the line that cannot be read."
        )
    return packed


def _finished(runs: Path, packed: Mapping[str, Files]) -> tuple[dict[str, Files], list[str]]:
    """The files of every run folder, and why some cannot be packed. A folder that holds nothing but what the
    pack has is what is left of a packing that was cut short: it comes without files.
    """
    found: dict[str, Files] = {}
    reasons: list[str] = []
    for path in sorted(runs.iterdir()) if runs.is_dir() else []:
        name = path.name
        reason = _in_the_way(path)
        if reason is None and name in packed:
            reason = _differs(path, packed[name])
            found[name] = {}
        elif reason is None:
            try:
                found[name] = files = {file: (path / file).read_bytes() for file in FILES}
                pack_line(name, files)
                reason = _kept_weights(path, files)
            except (NotPackable, RecursionError) as error:
                reason = f"{error}. Restore the file, or delete the folder"
            except FileNotFoundError as error:
                reason = _missing(Path(error.filename).name)
        if reason is not None:
            # A folder that was not understood must not be taken for one that may go.
            found.pop(name, None)
            reasons.append(f"{path.relative_to(runs.parent)}: {reason}")
    return found, reasons


def _missing(file: str) -> str:
    if file == "result.json":
        return "has no result.json, so the run has not ended. End it with the command that began it"
    return f"has no {file}, so the run is damaged. Restore it, or delete the folder"


def _in_the_way(path: Path) -> str | None:
    """Why a folder of a run is not touched, whatever its records are."""
    if path.is_symlink():
        return "is a link. Put the folder itself in its place"
    if not path.is_dir():
        return "is no folder of a run. Move it away"
    try:
        checked_name(path.name, what="run")
        if (path / "lock").exists():  # a folder without one is written by nobody
            with locked(path, what="run"):
                pass
    except LabError as error:
        return f"{error}"
    for file in sorted(path.iterdir()):
        if file.is_symlink() or not file.is_file():
            return f"holds {file.name}, which is no plain file. A pack cannot give it back: move it away"
        if not (file.name in FILES or _passing(file.name)):
            return f"holds {file.name}, which a pack has no place for. Move it away"
    return None


def _passing(file: str) -> bool:
    """Whether a file serves a run only until it has ended: its state, what trackers were sent, its lock."""
    return file == "lock" or file.startswith("checkpoint") or file.endswith((".tmp", ".sent"))


def _kept_weights(path: Path, files: Files) -> str | None:
    """A state of the last step is a trained model that was kept on purpose; others were for resuming."""
    steps = json.loads(files["result.json"]).get("steps")
    if any(state.get("step") == steps for state in checkpoint.readable(path)):
        return f"keeps the trained weights (of step {steps}). Move checkpoint.pt away, or delete it"
    return None


def _differs(path: Path, files: Files) -> str | None:
    """Why a folder is not what is left of a run in the pack; None if it is, or is not there."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        return "is no plain folder. Move it away"
    for file in FILES:
        if (path / file).exists() and (path / file).read_bytes() != files[file]:
            return f"holds another {file} than {NAME} does for the same run. Keep one of the two"
    return None


def _refuse(folder: Path, reasons: list[str]) -> None:
    if reasons:
        more = f"\nand {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        raise LabError(
            f"{folder} was left as it is: {len(reasons)} of its runs cannot be packed or unpacked.\n"
            + "\n".join(f"{reason}." for reason in reasons[:SHOWN])
            + more
        )


def _remove(path: Path) -> None:
    for file in sorted(path.iterdir()):
        os.unlink(file)
    os.rmdir(path)


def _remove_empty(runs: Path) -> None:
    if runs.is_dir() and not any(runs.iterdir()):
        os.rmdir(runs)
        sync_folder(runs.parent)
