"""Options of `sophia report`: page, pictures and tables of a comparison from its records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Draw a comparison again from its records: table, verdicts, report.html, and the pictures curves,
    speedups and curvature as PNG and SVG.

    Works on unfinished comparisons too, and on folders that somebody else sends.
    """

    folders: Positional[tuple[Path, ...]]
    """Folders of comparisons (those with a comparison.json)."""
    csv: bool = False
    """Also write ends.csv (a row a contender and budget) and curves.csv (a row a logged step)."""

    def run(self, command: str) -> int:
        """Report on each folder."""
        from rich.console import Console

        from sophia.lab.jobs.compare import show
        from sophia.lab.report.csv_tables import write_csv
        from sophia.lab.support.errors import UsageError

        console = Console()
        if not self.folders:
            raise UsageError("sophia report was given no folder. Write: sophia report comparisons/NAME")
        for folder in self.folders:
            show(folder, console)
            if self.csv:
                console.print(
                    "Tables:   " + ", ".join(map(str, write_csv(folder))), highlight=False, soft_wrap=True
                )
        return 0
