"""What each part of the spectral and the damped rule is worth: one at a time taken out, over paired seeds.

    python studies/own_rules/ablate_own_rules.py PROTOCOL.toml OUT.jsonl [STEPS]
    python studies/own_rules/ablate_own_rules.py --table OUT.jsonl

The settings are those of the protocol for both rules. Appends a line for each run to OUT.jsonl as it ends; a
run that is in the file is not made again. One thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.experiments.framework.mean_interval import mean_interval
from sophia.lab.protocols import protocol_file as protocol_files
from sophia.lab.support.json_lines import append_line, whole_lines
from sophia.lab.training import loop
from sophia.step import second_moments
from sophia.step.polar import polar_of
from sophia.step.rules import FACTORED, RULES, SPECTRAL, Rule, StepSettings
from sophia.step.second_moments import Equilibrated, Factored, Moment
from sophia.update_rule import look_ahead, rms, spectral_direction


@dataclass(frozen=True)
class Without(Equilibrated):
    """The spectral step of a hidden matrix without one of its parts."""

    ahead: bool = True
    orthogonalised: bool = True

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        u = look_ahead(seen.m, seen.g, beta1=seen.beta1) if self.ahead else seen.m
        fast = polar_of if self.orthogonalised else lambda x: x
        return spectral_direction(u, power=self.power, polar_of=fast)


class EveryEntry(Factored):
    """Adam: a second moment for every entry of a matrix too."""

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {"steps": (), "exp_avg_sq": tuple(shape)}


class RowsAndColumns(Factored):
    """Adafactor's: on the short side a number for each place as well, along no eigenvectors."""

    def direction(self, kept: MutableMapping[str, Tensor], seen: Moment) -> Tensor:
        with mock.patch.object(second_moments, "eigenbasis", lambda moment: torch.eye(len(moment))):
            return super().direction(kept, seen)


def by_h(u: Tensor, h: Tensor, size: Tensor | None, s: StepSettings) -> Tensor:
    """Whitened by the means of h over columns and rows: curvature in the place of u's squares."""
    rows, columns = (
        (h.mean(side, keepdim=True) / h.mean().clamp(min=1e-30)).clamp(min=1e-6) for side in (1, 0)
    )
    d = rows**-0.25 * polar_of(rows**-0.25 * u * columns**-0.25) * columns**-0.25
    return d / rms(d).clamp(min=1e-30)


def by_permuted_h(u: Tensor, h: Tensor, size: Tensor | None, s: StepSettings) -> Tensor:
    """The same numbers in the wrong places, the same ones at every step."""
    generator = torch.Generator().manual_seed(h.size(0))
    rows, columns = (torch.randperm(n, generator=generator) for n in h.shape)
    return by_h(u, h[rows][:, columns], size, s)


WITH_H = {"statistics": None, "looks_ahead": True}
REST = replace(FACTORED, statistics=EveryEntry(power=1 / 2))

# name: contender, settings put over the protocol's, rules that stand in the table instead. A changed rule
# is none of those that the faster paths know, so the plain path takes it.
PARTS: dict[str, tuple[str, dict[str, Any], Sequence[Rule]]] = {
    "spectral": ("sophia-spectral", {}, ()),
    "matrices whitened by h": ("sophia-spectral", {}, [replace(SPECTRAL, direction=by_h, **WITH_H)]),
    "matrices whitened by h in wrong places": (
        "sophia-spectral",
        {},
        [replace(SPECTRAL, direction=by_permuted_h, **WITH_H)],
    ),
    "power 1/8": ("sophia-spectral", {}, [replace(SPECTRAL, statistics=Without(power=1 / 8))]),
    "no whitening of the matrices": (
        "sophia-spectral",
        {},
        [replace(SPECTRAL, statistics=Without(power=0.0))],
    ),
    "no orthogonalisation": (
        "sophia-spectral",
        {},
        [replace(SPECTRAL, statistics=Without(power=1 / 4, orthogonalised=False))],
    ),
    "no look-ahead": ("sophia-spectral", {}, [replace(SPECTRAL, statistics=Without(1 / 4, ahead=False))]),
    "rest: a second moment of every entry (Adam)": (
        "sophia-spectral",
        {},
        [replace(SPECTRAL, otherwise=REST), REST],
    ),
    "rest: of rows and columns alone (Adafactor)": (
        "sophia-spectral",
        {},
        [
            replace(SPECTRAL, otherwise=replace(REST, statistics=RowsAndColumns(power=1 / 2))),
            replace(REST, statistics=RowsAndColumns(power=1 / 2)),
        ],
    ),
    "damped": ("sophia-damped", {}, ()),
    "damped, no damping": ("sophia-damped", {"damping": 0.0}, ()),
    "damped, no h": ("sophia-damped", {"gamma": 1e-9}, ()),
}


def table(records: Path) -> str:
    """Of every part the end loss, and the difference from the rule whose part it is, over paired seeds."""
    ends: dict[str, dict[int, float]] = {}
    for row in whole_lines(records):
        ends.setdefault(row["part"], {})[row["seed"]] = row["loss"]
    lines = ["| | end loss | difference over paired seeds, 90% interval | seeds |", "|---|---|---|---|"]
    for part, mine in ends.items():
        base = ends["damped" if part.startswith("damped") else "spectral"]
        mean, *_ = mean_interval(list(mine.values()))
        spread = f" ± {stdev(mine.values()):.3f}" if len(mine) > 1 else ""
        words = ""
        if mine is not base:
            gap, low, high = mean_interval([mine[seed] - base[seed] for seed in sorted(mine)])
            words = f"{gap:+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if len(mine) > 1 else "")
        lines.append(f"| {part} | {mean:.3f}{spread} | {words} | {len(mine)} |")
    return "".join(line + "\n" for line in lines)


def main(protocol_file: Path, out: Path, steps: int) -> None:
    """Run what is missing, part by part within a seed."""
    protocol = protocol_files.load(protocol_file)
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    done = {(row["part"], row["seed"], row["steps"]) for row in whole_lines(out)}
    for seed in protocol.seeds:
        for part, (contender, settings, rules) in PARTS.items():
            if (part, seed, steps) in done:
                continue
            run = protocol.run(
                contender,
                data=Data(text.name, text.sha256, vocabulary.SHA256),
                seed=seed,
                steps=steps,
                device="cpu",
            )
            named = replace(run.optimizer, settings={**run.optimizer.settings, **settings})
            run = replace(run, optimizer=named)
            instead = {rule.name: rule for rule in rules}
            with tempfile.TemporaryDirectory() as folder, mock.patch.dict(RULES, instead):
                result = loop.train(run, Path(folder), ids)
            row = {
                "part": part,
                "seed": seed,
                "steps": steps,
                "loss": result["loss"],
                "settings": named.settings,
            }
            append_line(out, row)
            print(f"{part}, seed {seed}: {result['loss']}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, help="print the table of these records, and run nothing")
    parser.add_argument("protocol", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("steps", type=int, nargs="?", default=200)
    options = parser.parse_args()
    if options.table is not None:
        print(table(options.table), end="")
    elif options.out is None:
        parser.error("give a protocol and a file for the records, or --table and the file")
    else:
        main(options.protocol, options.out, options.steps)
