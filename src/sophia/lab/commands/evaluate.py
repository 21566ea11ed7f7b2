"""Options and table of `sophia evaluate`: few-shot accuracy of a trained run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

__all__ = ["Evaluate"]

PAPER = ("boolq", "cb", "copa", "sglue_rte")
"""As recalled; in the harness "rte" is another benchmark's."""


@dataclass(frozen=True)
class Evaluate:
    """Few-shot accuracy of a run of sophia pretrain, by lm-evaluation-harness (the extra [eval]).

    For instance: sophia evaluate runs/HASH --tasks boolq --tasks copa --download. Give two runs to see them
    beside each other. Without --download nothing is fetched.
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of runs whose last weights were kept."""
    tasks: tuple[str, ...] = ()
    """Name of a task, as often as one likes; unless given, the paper's as recalled: boolq, cb, copa,
    sglue_rte.
    """
    folder: Path | None = None
    """Folder of YAML files with tasks of your own; then there are no others."""
    shots: int = 2
    """Examples in a prompt."""
    draws: int = 5
    """Draws of the examples; the mean over them is printed."""
    limit: int | None = None
    """Score the first so many items of a task only."""
    tokenizer: Path | None = None
    """Folder that AutoTokenizer reads, for runs on other tokens than the shipped vocabulary's."""
    download: bool = False
    """Let the harness fetch the data of its tasks from a hub."""
    device: str = "cpu"
    """cpu or cuda."""

    def run(self, command: str) -> int:
        """Evaluate each run and print a table."""
        from statistics import fmean, stdev

        from rich.console import Console
        from rich.table import Table

        from sophia.lab.jobs import evaluate
        from sophia.lab.training import export_model

        evaluate.require("sophia evaluate")
        table = Table(box=None, pad_edge=False)
        for title in ("run", "task", "shots", "items", "accuracy", "spread over draws"):
            table.add_column(title, justify="left" if title in ("run", "task") else "right")
        for run in self.runs:
            model, config = export_model.trained(run)
            if self.tokenizer is None:
                words = export_model.tokenizer(config)
            else:
                from transformers import AutoTokenizer

                words = AutoTokenizer.from_pretrained(self.tokenizer, local_files_only=True)
            scores = evaluate.evaluate(
                model.to(self.device),
                words,
                self.tasks or PAPER,
                shots=self.shots,
                draws=range(1, self.draws + 1),
                folder=self.folder,
                download=self.download,
                limit=self.limit,
            )
            for task in dict.fromkeys(score.task for score in scores):
                own = [score for score in scores if score.task == task]
                found = [score.accuracy for score in own]
                spread = f"{stdev(found):.3f}" if len(found) > 1 else ""
                name = f"{config.optimizer.contender}, {config.steps} steps, {run.name}"
                table.add_row(name, task, str(self.shots), str(own[0].items), f"{fmean(found):.3f}", spread)
        Console().print(table)
        return 0
