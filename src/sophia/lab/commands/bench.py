"""Options of `sophia bench`; implemented in ``sophia.lab.bench``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

__all__ = ["Bench"]


@dataclass(frozen=True)
class Bench:
    """Time optimizers against torch's fused AdamW on this machine, on a built-in model or on yours.

    Step alone, whole training step, refresh, both at an interval k, peak memory, bytes of state.
    """

    methods: Positional[tuple[str, ...]] = ()
    """Rows to measure, for instance "sophia" "lion-pytorch"; all that are installed unless given."""
    model: str = "small"
    """small, wide or tiny; or module:function of your own, which returns (model, inputs) or (model, inputs,
    loss_of).
    """
    k: int = 10
    """Steps between two refreshes, for the amortised cost."""
    threads: int = 1
    """Threads of torch on the CPU."""
    rounds: int = 5
    """Rounds of training steps; steps alone get eight times as many."""
    device: str = "cpu"
    """cpu or cuda."""
    json: Path | None = None
    """File for the record: numbers, date, machine, commit."""
    picture: Path | None = None
    """File for the picture, .png or .svg."""
    no_memory: bool = False
    """Leave out peak memory, which takes a process for each row."""
    quick: bool = False
    """A tiny model and two rounds: seconds, to see what it does. Its ratios mean nothing."""

    def run(self, command: str) -> int:
        """Measure, and print the table."""
        from rich.console import Console

        from sophia.lab.bench.measure import measure
        from sophia.lab.bench.results_table import save, table
        from sophia.lab.support.errors import UsageError
        from sophia.lab.support.files import write_json

        for name in ("k", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}, and less than one measures nothing.")
        if self.picture is not None and self.picture.suffix not in (".png", ".svg"):
            raise UsageError(f"--picture {self.picture}: name it .png or .svg.")
        console = Console()
        with console.status("") as status:
            record = measure(
                "tiny" if self.quick else self.model,
                names=self.methods,
                threads=self.threads,
                device=self.device,
                rounds=2 if self.quick else self.rounds,
                every=self.k,
                with_memory=not (self.no_memory or self.quick),
                tell=lambda name: status.update(name),
            )
        console.print(table(record))
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.json, record)
        if self.picture is not None:
            save(record, self.picture)
        return 0
