"""What an experiment is: a claim, how it is put to the test, its picture, and what its records say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sophia.lab.experiments.framework.progress import Progress
    from sophia.lab.experiments.framework.records import Records

__all__ = ["Experiment", "Verdict", "Word"]

Word = Literal["holds", "holds in part", "not seen at this scale", "contradicted"]


@dataclass(frozen=True)
class Verdict:
    """What records say of a claim."""

    word: Word
    """"holds", "holds in part", "not seen at this scale" or "contradicted"."""
    sentence: str
    """What was seen, with its numbers, and where it stops; a sentence or two, ending with a full stop."""

    def __post_init__(self) -> None:
        if self.word not in get_args(Word):
            raise ValueError(f"the verdict is {self.word!r}: write one of {', '.join(get_args(Word))}")
        if not self.sentence.endswith("."):
            raise ValueError(f"the sentence ends in {self.sentence[-10:]!r}: end it with a full stop")


@dataclass(frozen=True)
class Experiment:
    """One experiment. A module of this package defines it as ``EXPERIMENT``; ``NAMES`` in the package lists
    the modules.
    """

    name: str
    """What is typed: ``sophia experiment toy-landscape``. The module has the same name with underscores."""
    title: str
    """A few words."""
    claims: tuple[int, ...]
    """Numbers of the claims it bears on; see ``sophia.lab.experiments.framework.claims``."""
    claim: str
    """What the paper says, and where, in a sentence or two."""
    scale: str
    """What is run here, and how far that is from the paper's scale."""
    expected: str
    """What was expected before the run, with the reason."""
    runtime: str
    """Of the full run and of the quick one, on which machine."""
    figure: str
    """Caption of the picture."""
    record: str
    """What a row of the records holds."""
    run: Callable[[bool, Records, Progress], None]
    """``run(quick, records, progress)`` adds the rows that are missing, and nothing else. Quick takes seconds
    and exercises every path; its numbers mean nothing.
    """
    draw: Callable[[Records], Figure]
    """The picture, from the records alone, complete or not (a run that was stopped is drawn too)."""
    verdict: Callable[[Records], Verdict]
    """What finished records say."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Modules beyond the lab's without which it cannot run, and the extra that brings each."""
    parts: tuple[str, ...] = ()
    """The parts of Sophia whose numbers its rows hold, as in ``sophia.numerics``."""
    version: int = 1
    """Raise it when the experiment's own numbers change: rows of two versions are not mixed."""
