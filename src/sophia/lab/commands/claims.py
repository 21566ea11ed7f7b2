"""Options of `sophia claims`: the page of claims from the records of the experiments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Claims"]


@dataclass(frozen=True)
class Claims:
    """Write docs/claims.md: every claim with its experiments, their verdicts and their records; and the
    picture of each experiment, in images/claims beside the page.
    """

    out: Path = Path("docs/claims.md")
    """File to write."""
    records: Path = Path("results/experiments")
    """Folder of the records."""
    check: bool = False
    """Write nothing; exit with 1 if the file is not what the records say, or a picture is missing."""

    def run(self, command: str) -> int:
        """Write or check the page."""
        import os

        from sophia.lab import experiments
        from sophia.lab.experiments.framework import runner
        from sophia.lab.experiments.framework.claims_page import PICTURES, page
        from sophia.lab.experiments.framework.records import Records
        from sophia.lab.support.errors import LabError
        from sophia.lab.support.files import write_atomically

        link = Path(os.path.relpath(self.records, self.out.parent)).as_posix()
        every = experiments.every()
        text = page(every, self.records, link=link)
        pictures = {
            self.out.parent / PICTURES / f"{experiment.name}.png": (experiment, records)
            for experiment in every
            if (records := Records(runner.folder_of(experiment.name, self.records))).finished
        }
        if self.check:
            there = self.out.read_text(encoding="utf-8") if self.out.exists() else ""
            if there != text:
                raise LabError(f"{self.out} is not what the records say. Write: sophia claims")
            if missing := [path for path in pictures if not path.exists()]:
                raise LabError(f"{missing[0]} is not there, and {self.out} shows it. Write: sophia claims")
            print(f"{self.out} is what the records say.")
            return 0
        write_atomically(self.out, lambda file: file.write(text.encode()))
        for path, (experiment, records) in pictures.items():
            runner.draw(experiment, records, path)
        print(f"Wrote {self.out}, and {len(pictures)} pictures beside it.")
        return 0
