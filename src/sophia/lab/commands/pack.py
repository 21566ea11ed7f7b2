"""`sophia pack`: the runs of a folder as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

__all__ = ["Pack"]


@dataclass(frozen=True)
class Pack:
    """Put the finished runs of a comparison into one file, runs.jsonl, a line a run: to be committed or sent.

    Everything that reads runs reads both forms: `sophia report` gives the same bytes, and `sophia compare`
    on a packed folder counts the runs that are there, trains what is missing in folders, and can be packed
    again. A run that has not ended, is being written or is damaged is named, and nothing is changed. Folders
    are removed after the file was read back from the disk; --unpack makes them again, byte for byte. States
    for resuming (checkpoints) are not kept.
    """

    folders: Positional[tuple[Path, ...]]
    """Folders in which `runs` lies: of comparisons, searches, or of `sophia train`."""
    unpack: bool = False
    """The other way: a folder for each run of runs.jsonl, which is then removed."""

    def run(self, command: str) -> int:
        """Pack or unpack each folder."""
        from sophia.lab.jobs import pack
        from sophia.lab.support.errors import UsageError
        from sophia.lab.support.units import size

        if not self.folders:
            raise UsageError("sophia pack was given no folder. Write: sophia pack comparisons/NAME")
        for folder in self.folders:
            done = (pack.unpack if self.unpack else pack.pack)(folder)
            if self.unpack:
                what = f"{done.moved} runs unpacked" if done.moved else f"its {done.runs} runs are in folders"
            elif done.moved:
                what = f"{done.moved} runs packed, {done.runs} in runs.jsonl ({size(done.size)})"
            else:
                what = f"its {done.runs} runs are packed ({size(done.size)})"
            print(f"{folder}: {what}.")
        return 0
