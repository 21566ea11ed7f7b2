"""Options of `sophia audit`; implemented in ``sophia.lab.jobs.audit``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from sophia.lab.jobs.audit import Finding

__all__ = ["Audit"]


@dataclass(frozen=True)
class Audit:
    """Read an optimizer's h from its steps and hold it to a curvature that is known exactly.

    Exits with 1 if a right way of calling it is not Sophia.
    """

    optimizer: Positional[str]
    """The class, as module:Class, for instance sophia:Sophia."""
    second_order: bool = False
    """It needs backward(create_graph=True): it differentiates the gradient again inside step()."""
    json: Path | None = None
    """File for the findings as JSON."""

    def run(self, command: str) -> int:
        """Audit, and print the table and the conclusion."""
        from rich.console import Console

        from sophia.lab.jobs.audit import audit, conclusion
        from sophia.lab.support.files import write_json
        from sophia.lab.support.import_by_path import load_class

        findings = audit(load_class(self.optimizer), second_order=self.second_order)
        said = conclusion(findings)
        console = Console()
        console.print(_table(self.optimizer, findings))
        console.print(f"{self.optimizer}: {said}.", highlight=False)
        if self.json is not None:
            rows = [{**asdict(finding), "verdict": finding.verdict} for finding in findings]
            write_json(self.json, {"optimizer": self.optimizer, "conclusion": said, "findings": rows})
        return 0 if all(f.verdict == "Sophia" for f in findings if f.right) else 1


def _table(optimizer: str, findings: Sequence[Finding]) -> Table:
    from rich.table import Table

    table = Table(title=f"h of {optimizer}, read from its steps", title_justify="left")
    for title in ("case", "way of calling", "h / truth", "correlation", "verdict"):
        table.add_column(title, justify="right" if title in ("h / truth", "correlation") else "left")
    for finding in findings:
        table.add_row(
            finding.case,
            "right" if finding.right else "mistake",
            "" if finding.ratio is None else f"{finding.ratio:.3g}",
            "" if finding.correlation is None else f"{finding.correlation:.2f}",
            f"{finding.verdict} ({finding.note})" if finding.note else finding.verdict,
        )
    return table
