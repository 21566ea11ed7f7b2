"""Options and table of `sophia contenders`: costs of a step and search spaces."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

__all__ = ["Contenders"]


@dataclass(frozen=True)
class Contenders:
    """List the contenders: what they are, what a step costs with their default settings, and their search
    space. Those of installed packages too, and classes of your own as module:Class.
    """

    names: Positional[tuple[str, ...]] = ()
    """Only these; with their settings and search spaces in full."""

    def run(self, command: str) -> int:
        """Print the table."""
        from rich.console import Console
        from rich.table import Table

        from sophia.lab.optimizers import table as contenders
        from sophia.lab.optimizers.third_party import offered
        from sophia.lab.protocols.protocol import split_label

        console = Console()
        labels = [split_label(name) for name in self.names]
        rows = [contenders.find(*label) for label in labels] or [
            contenders.find(name) for name in (*contenders.CONTENDERS, *offered())
        ]
        table = Table(box=None, pad_edge=False)
        table.add_column("contender", no_wrap=True)
        table.add_column("what it is")
        for title in ("gradient evaluations a step", "state, bytes a parameter", "settings searched"):
            table.add_column(title, justify="right")
        for row in rows:
            cost = 1 + row.gradients(row.settings({}))
            state = str(row.state_per_parameter) if row.state_per_parameter else "measured"
            table.add_row(row.name, row.title, f"{cost:.3g}", state, str(len(row.space)))
        console.print(table)
        for row in rows if self.names else ():
            console.print(f"\n[bold]{row.name}[/bold]", highlight=False)
            for name in dict.fromkeys((*row.defaults, *row.space)):
                kind = row.space.get(name)
                varied = "" if kind is None else f"   searched: {kind.words}"
                default = row.defaults.get(name, "the schedule's")
                console.print(f"  {name} = {default}{varied}", highlight=False, markup=False)
            if row.line:
                other = ", ".join(f"{name} = {value}" for name, value in row.line_has.items())
                console.print(
                    f"In a script: {row.line}, but that has {other}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
        return 0
