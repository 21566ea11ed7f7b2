"""`sophia claims`: the page of claims from the records of the experiments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Claims"]


@dataclass(frozen=True)
class Claims:
    """Write docs/claims.md: every claim with its experiments, their verdicts and their records."""

    out: Path = Path("docs/claims.md")
    """File to write."""
    records: Path = Path("results/experiments")
    """Folder of the records."""
    check: bool = False
    """Write nothing; exit with 1 if the file is not what the records say."""

    def run(self, command: str) -> int:
        """Write or check the page."""
        import os

        from sophia.lab import experiments
        from sophia.lab.experiments.framework.claims_page import page
        from sophia.lab.support.errors import LabError
        from sophia.lab.support.files import write_atomically

        link = Path(os.path.relpath(self.records, self.out.parent)).as_posix()
        text = page(experiments.every(), self.records, link=link)
        if self.check:
            there = self.out.read_text(encoding="utf-8") if self.out.exists() else ""
            if there != text:
                raise LabError(f"{self.out} is not what the records say. Write: sophia claims")
            print(f"{self.out} is what the records say.")
            return 0
        write_atomically(self.out, lambda file: file.write(text.encode()))
        print(f"Wrote {self.out}.")
        return 0
