"""The paper's runs as files, for machines that can do them: one for each size, with every contender's
settings.

What a recipe says is the model, the batch, the schedule and the optimizers; where it runs and in how many
parts a batch is cut is said when it is started. ``sophia pretrain`` trains one, ``forecast`` says what that
takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sophia.lab.config.field_types import AtLeastZero, Count, Device, Fraction, Precision, Whole
from sophia.lab.config.run import Data, Evaluation, Model, Run, Schedule, Setting
from sophia.lab.optimizers import table as contenders
from sophia.lab.support.dataclass_json import checked_dataclass
from sophia.lab.support.errors import UsageError
from sophia.lab.support.toml_files import from_toml, packaged

__all__ = ["Recipe", "find", "load", "recipes"]


@checked_dataclass(frozen=True)
class Recipe:
    """A size of the paper."""

    name: str
    about: str
    """One line for people."""
    tokens: str
    """Which text the paper used."""
    vocabulary: str
    """Which vocabulary its tokens are of."""
    steps: Count
    batch: Count
    """Sequences in a step, over all processes."""
    warmup: Whole
    """Steps, whatever the length of the run."""
    model: Model
    contenders: Mapping[str, Mapping[str, Setting]]
    """Settings over the defaults, by contender."""
    floor: Fraction = 0.05
    clip: AtLeastZero = 1.0
    precision: Precision = "bfloat16"
    evaluations: Count = 100
    """Evaluations of a whole run."""
    held_out: Count = 512
    """Held-out sequences of an evaluation."""
    recalled: tuple[str, ...] = ()
    """Dotted names of what was written from memory of the paper."""
    chosen: tuple[str, ...] = ()
    """Dotted names of what is not known, and ours."""

    def __post_init__(self) -> None:
        for name, settings in self.contenders.items():
            contenders.find(name).settings(settings)
        for dotted in (*self.recalled, *self.chosen):
            section, _, key = dotted.partition(".")
            known = vars(self.model) if section == "model" else self.contenders.get(section, {})
            if key not in known:
                raise UsageError(
                    f"{dotted!r} is marked, but there is no such value in the recipe. Write model.NAME or "
                    "CONTENDER.SETTING."
                )

    def run(
        self,
        contender: str,
        *,
        data: Data,
        seed: int,
        steps: int | None = None,
        micro_batches: int = 1,
        device: Device = "cuda",
        over: Mapping[str, Setting] | None = None,
    ) -> Run:
        """The run of a contender. Raises ``UsageError`` for one that the recipe has no settings for."""
        if contender not in self.contenders:
            raise UsageError(
                f"{self.name} has no settings for {contender!r}, and defaults of a smaller scale would not "
                f"be fair to it. It has {', '.join(self.contenders)}; add [contenders.{contender}] to a copy "
                "of its file."
            )
        steps = self.steps if steps is None else steps
        settings = {**self.contenders[contender], **(over or {})}
        return Run(
            data=data,
            optimizer=contenders.find(contender).configured(settings),
            model=self.model,
            schedule=Schedule(warmup=self.warmup, floor=self.floor),
            evaluation=Evaluation(every=max(1, steps // self.evaluations), sequences=self.held_out),
            steps=steps,
            batch=self.batch,
            micro_batches=micro_batches,
            clip=self.clip,
            seed=seed,
            device=device,
            precision=self.precision,
        )


def recipes() -> dict[str, Path]:
    """The packaged recipes by name, smallest first."""
    return packaged("sophia.lab.protocols", "recipes")


def load(path: Path) -> Recipe:
    """Read and check a file. Raises ``UsageError`` that names the file and what is wrong in it."""
    return from_toml(Recipe, path, page="docs/recipes.md")


def find(name: str) -> Recipe:
    """A packaged recipe by its name, or the one in a file."""
    known = recipes()
    if name in known:
        return load(known[name])
    if name.endswith(".toml"):
        return load(Path(name))
    raise UsageError(
        f"There is no recipe {name!r}. Choose from: {', '.join(known)}; or give a file that ends in .toml."
    )
