"""T steps of AdamW against T/2 of Sophia, each with a whole schedule of its own, at several sizes.

The comparison of a size is an ordinary one: a protocol, a search with equal trials for both, runs at T and
T/2 with paired seeds, in a folder that `sophia report` reads. Two of the sizes were compared before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log10, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sophia.lab.analysis.made_by import other_code
from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.analysis.seed_noise import Estimate, contrast, noise_by_budget
from sophia.lab.analysis.speedup import Ratio, curve_of, speedup
from sophia.lab.data import corpus, tokens
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.protocols import freeze, plan, protocol_file
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.support.dataclass_json import to_json
from sophia.lab.support.errors import LabError
from sophia.lab.support.toml_files import packaged
from sophia.lab.training.loop import Progress as Trained
from sophia.lab.training.loop import train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Gap", "Line", "gaps", "line"]

BASELINE, CONTENDER = "adamw", "sophia-g"
PAPER = {"125M": 125e6, "355M": 355e6, "770M": 770e6}


@dataclass(frozen=True)
class Size:
    """One size, by the name of its protocol."""

    protocol: str
    """A preset of the lab, or a file beside this one."""
    finished: str | None = None
    """Folder, in a clone of the project, of a comparison that was done before."""


SIZES = (
    Size("half-300k"),
    Size("quick", "results/comparisons/quick"),
    Size("million", "results/comparisons/million"),
)
LARGER = ("half-3m", "half-10m")
"""Protocols beside this file that take longer: read where `sophia sweep` and `sophia compare` have done them,
with the folder of that name beside the records as --out of the comparison.
"""


def run(quick: bool, records: Records, progress: Progress) -> None:
    """Search and compare at each size, or read what was compared before; a row for each end."""
    sizes = (Size("tiny"), Size("tiny-2")) if quick else SIZES
    for number, size in enumerate(sizes):
        progress.case(number, len(sizes), size.protocol)
        if records.where(size=size.protocol):
            continue
        progress.check()
        folder = Path(size.finished) if size.finished is not None else records.folder / size.protocol
        if size.finished is None or not (folder / "comparison.json").exists():
            folder = records.folder / size.protocol
            _compare(_protocol(size.protocol, quick), folder, progress, search=not quick)
        _read(records, size.protocol, folder)
    for name in LARGER:
        folder = records.folder / name
        if not records.where(size=name) and (folder / "comparison.json").exists():
            _read(records, name, folder)
    progress.case(len(sizes), len(sizes), "")


def _read(records: Records, size: str, folder: Path) -> None:
    """A row for each end of a comparison; none if a run of it has not ended. Raises ``LabError`` for runs of
    other numbers than today's, whose rows would pass for today's.
    """
    runs = read_evidence(folder).runs
    if said := other_code(runs):
        raise LabError(f"{folder}: {said}. Move that folder away, and the comparison is made again.")
    if all(r.status in ("finished", "diverged") for r in runs):
        for r in runs:
            records.add(
                {"size": size, "contender": r.contender, "steps": r.steps, "seed": r.seed},
                status=r.status,
                loss=r.number("loss"),
                parameters=r.number("parameters"),
            )


def _protocol(name: str, quick: bool) -> Protocol:
    if quick:  # two models of the smallest preset, of different sizes
        tiny = protocol_file.chosen("tiny", None)
        model = replace(tiny.model, width=16 if name == "tiny" else 24)
        return replace(tiny, name=name, budgets=(4, 8), model=model)
    if name in protocol_file.presets():
        return protocol_file.chosen(name, None)
    return protocol_file.load(packaged("sophia.lab.experiments", "protocols")[name])


def _compare(protocol: Protocol, folder: Path, progress: Progress, *, search: bool) -> None:
    """The search, unless it is done, and the runs that are missing."""
    if search:
        found = folder.with_name(f"{folder.name}-search")
        if not (found / "tuned.toml").exists():
            from rich.console import Console

            from sophia.lab.jobs.sweep import sweep

            sweep(protocol, out=found, workers=1, console=Console(quiet=True))
        protocol = protocol_file.load(found / "tuned.toml")
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    planned = plan.make_plan(protocol, text, ids)
    frozen = {
        "protocol.json": {"hash": planned.protocol.hash, "protocol": to_json(planned.protocol)},
        "comparison.json": planned.to_json(),
    }
    freeze.check(folder, frozen, what="comparison")
    freeze.write(folder, frozen)
    for number, config in enumerate(planned.runs):

        def report(trained: Trained, number: int = number, steps: int = config.steps) -> None:
            progress.within((number + trained.step / steps) / len(planned.runs))

        train(config, folder / "runs", ids, stop=progress.stop, report=report)


@dataclass(frozen=True)
class Gap:
    """One size."""

    size: str
    parameters: float
    steps: int
    """T."""
    difference: Estimate
    """End loss of Sophia-G after T/2 steps minus that of AdamW after T, nats a token."""
    ratio: Ratio | None
    """The speed-up in steps at Sophia-G's largest budget; None if AdamW's curve gives none."""


def gaps(records: Records) -> list[Gap]:
    """Of every size whose runs at T and T/2 are there, the smallest first."""
    found = []
    for size in records.values("size"):
        rows = records.where(size=size)
        ends = {
            (r.case["contender"], r.case["steps"], r.case["seed"]): float(r.result["loss"])
            for r in rows
            if r.result["loss"] is not None
        }
        most = max(r.case["steps"] for r in rows)
        noise = noise_by_budget(ends)
        difference = contrast(ends, {(CONTENDER, most // 2): 1.0, (BASELINE, most): -1.0}, noise)
        if difference is None:
            continue
        curve = curve_of(ends, BASELINE, noise)
        ratio = None if isinstance(curve, str) else speedup(ends, CONTENDER, BASELINE, curve, noise)
        parameters = next(r.result["parameters"] for r in rows if r.result["parameters"] is not None)
        found.append(Gap(size, parameters, most, difference, ratio))
    return sorted(found, key=lambda g: g.parameters)


@dataclass(frozen=True)
class Line:
    """A straight line of the gap against log10 of the parameters, by least squares over the sizes."""

    slope: float
    offset: float
    spread: float
    """Standard deviation of the sizes around it, n - 2 degrees of freedom."""
    centre: float
    squares: float
    sizes: int

    def at(self, parameters: float) -> tuple[float, float, float]:
        """The gap expected of another size, with a 90% interval for it (Student's t, n - 2 degrees); it holds
        if the line is straight, which nothing here tests.
        """
        from scipy import stats

        x = log10(parameters)
        value = self.offset + self.slope * (x - self.centre)
        error = self.spread * sqrt(1 + 1 / self.sizes + (x - self.centre) ** 2 / self.squares)
        half = float(stats.t.ppf(0.95, self.sizes - 2)) * error if self.sizes > 2 else inf
        return value, value - half, value + half


def line(found: Sequence[Gap]) -> Line | None:
    """Through the sizes; None for fewer than three."""
    if len(found) < 3:
        return None
    x = np.log10([g.parameters for g in found])
    y = np.array([g.difference.value for g in found])
    centre = float(x.mean())
    squares = float(((x - centre) ** 2).sum())
    slope = float(((x - centre) * y).sum() / squares)
    residuals = y - y.mean() - slope * (x - centre)
    spread = sqrt(float((residuals**2).sum()) / (len(found) - 2))
    return Line(slope, float(y.mean()), spread, centre, squares, len(found))


def _words(e: Estimate) -> str:
    return (
        f"{e.value:+.3f}"
        if e.low is None or e.high is None
        else f"{e.value:+.3f} ({e.low:+.3f} to {e.high:+.3f})"
    )


def verdict(records: Records) -> Verdict:
    """At how many sizes half the steps are enough, and what a straight line says of the paper's."""
    found = gaps(records)
    if not found:
        return Verdict("not seen at this scale", "No size has runs that ended at T and at T/2.")
    signs = [g.difference.sign for g in found]
    each = "; ".join(f"{g.parameters / 1e6:.2g}M {_words(g.difference)}" for g in found)
    sentence = (
        f"End loss of Sophia-G after T/2 steps minus AdamW's after T = {found[-1].steps}, nats a token with "
        f"90% intervals: {each}. Half the steps are enough at {sum(s <= 0 for s in signs)} of {len(found)} "
        "sizes."
    )
    if fit := line(found):
        value, low, high = fit.at(PAPER["125M"])
        sentence += (
            f" A straight line in the logarithm of the size has {value:+.2f} ({low:+.2f} to {high:+.2f}) at "
            f"125M parameters, {PAPER['125M'] / found[-1].parameters:.0f} times beyond the largest size "
            "measured; that it is straight so far is an assumption."
        )
    if all(s < 0 for s in signs):
        return Verdict("holds", sentence)
    return Verdict("holds in part" if any(s <= 0 for s in signs) else "not seen at this scale", sentence)


def draw(records: Records) -> Figure:
    """End losses against steps for each size; the gap against the size, with the line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from sophia.lab.report.labels import spread

    figure = Figure(figsize=(10, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    found = gaps(records)
    ends: list[tuple[float, float, str]] = []
    for shade, size in zip(
        np.linspace(0.35, 1.0, len(records.values("size"))), _ordered(records), strict=True
    ):
        for contender, colour in ((BASELINE, "#2b2b2b"), (CONTENDER, "#d55e00")):
            budgets = sorted({r.case["steps"] for r in records.where(size=size, contender=contender)})
            points = [
                (b, [r.result["loss"] for r in records.where(size=size, contender=contender, steps=b)])
                for b in budgets
            ]
            whole = [(b, losses) for b, losses in points if losses and None not in losses]
            means = [float(np.mean(losses)) for _, losses in whole]
            left.plot([b for b, _ in whole], means, "o-", ms=4, lw=1.3, color=colour, alpha=shade)
            if means and contender == BASELINE:
                ends.append((whole[-1][0], means[-1], f" {_millions(records, size)}"))
    places = spread([y for _, y, _ in ends], *left.get_ylim(), gap=0.045 * float(np.ptp(left.get_ylim())))
    for (end, _, label), place in zip(ends, places, strict=True):
        left.annotate(label, (end, place), fontsize=8, va="center")
    left.plot([], [], color="#2b2b2b", label=BASELINE)
    left.plot([], [], color="#d55e00", label=CONTENDER)
    left.legend(frameon=False, fontsize=9)
    left.set(xscale="log", xlabel="steps of a whole schedule")
    left.xaxis.set_major_locator(FixedLocator(sorted(records.values("steps"))))
    left.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_title("End loss, nats a token; paler: smaller models", loc="left", fontsize=10)
    if fit := line(found):
        x = np.geomspace(min(g.parameters for g in found), PAPER["770M"], 60)
        band = np.array([fit.at(float(n)) for n in x])
        right.plot(x, band[:, 0], "--", color="#6b6b6b", lw=1.2)
        right.fill_between(x, band[:, 1], band[:, 2], color="#6b6b6b", alpha=0.12, lw=0)
        heights = [g.difference.value for g in found]
        right.set_ylim(min(-0.6, *heights) - 0.3, max(heights) + 0.6)
    for g in found:
        e = g.difference
        right.errorbar(
            g.parameters,
            e.value,
            yerr=None if e.low is None or e.high is None else [[e.value - e.low], [e.high - e.value]],
            fmt="o",
            color="#d55e00",
            capsize=3,
        )
    for name, n in PAPER.items():
        right.plot(n, 0.0, "v", color="#0072b2", ms=6)
        right.annotate(name, (n, 0), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    right.axhline(0, color="#999999", lw=0.8)
    right.set(xscale="log", xlabel="parameters")
    right.set_title("sophia-g at T/2 minus adamw at T, nats", loc="left", fontsize=10)
    return figure


def _ordered(records: Records) -> list[str]:
    """Sizes, the smallest first."""
    return sorted(records.values("size"), key=lambda size: _parameters(records, size))


def _parameters(records: Records, size: str) -> float:
    return max((r.result["parameters"] or 0.0 for r in records.where(size=size)), default=0.0)


def _millions(records: Records, size: str) -> str:
    return f"{_parameters(records, size) / 1e6:.2g}M"


EXPERIMENT = Experiment(
    name="half-the-steps",
    title="Sophia-G after T/2 steps against AdamW after T, by model size",
    claims=(6,),
    claim=(
        "Sophia reaches AdamW's loss in half of the steps, compute and time, from 125M to 770M parameters, "
        "and more so the larger the model; each with a learning-rate schedule for its own number of steps "
        "(section 3; 100,000 steps of 480 x 1,024 tokens)."
    ),
    scale=(
        "GPT-2 of 0.28M, 0.74M, 1.1M, 3M and 10M parameters, T = 800 steps of 16 x 64 tokens, presidents' "
        "messages. AdamW and Sophia-G (single labels, which were the default when it was run) tuned with the "
        "same number of trials (10, 12, 10, and 5 at 3M and at 10M, of the learning rate alone; at 10M the "
        "lowest of the five was the best for both), two or three paired seeds. The recipes of the paper's "
        "own sizes are ready and not run (sophia pretrain)."
    ),
    expected=(
        "Not seen: at 0.7M and 1.1M Sophia-G was behind AdamW at equal steps, and half of 800 steps is far "
        "from 800 at these sizes. Independent runs at 125M with a tuned AdamW did not see it either."
    ),
    runtime=(
        "about 20 minutes on one core (without the sizes compared before; 3M took 25 more, 10M about 80); "
        "quick 5 s"
    ),
    figure=(
        "Left: end losses of whole schedules. Right: the gap with 90% intervals by size, a straight line "
        "through it with the 90% interval of a further size, and (triangles) where the paper has no gap."
    ),
    record=(
        "An end of a run: size (by protocol), contender, steps, seed; loss and parameters. The runs were "
        "made by 68f9b4d (0.28M), 6c421e1 (0.74M), 0ed5c93 (1.1M) and 537d628 (3M, 10M); what follows read "
        "them."
    ),
    run=run,
    draw=draw,
    verdict=verdict,
    parts=("gnb", "hutchinson", "paper"),
)
