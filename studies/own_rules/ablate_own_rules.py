"""What each part of the spectral and the damped rule is worth: one at a time taken out, over paired seeds.

    python studies/own_rules/ablate_own_rules.py PROTOCOL.toml OUT.jsonl [STEPS]

The settings are those of the protocol for both rules. Appends a line for each run to OUT.jsonl as it ends; a
run that is in the file is not made again. One thread.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.protocols import protocol_file as protocol_files
from sophia.lab.support.json_lines import append_line, whole_lines
from sophia.lab.training import loop
from sophia.step.polar import polar_of
from sophia.step.rules import DAMPED, RULES, SPECTRAL, Rule, StepSettings
from sophia.update_rule import spectral_direction


def without_whitening(u: Tensor, h: Tensor, size: Tensor | None, s: StepSettings) -> Tensor:
    """The spectral direction where all curvatures are equal."""
    return spectral_direction(u, torch.ones_like(h), polar_of=polar_of)


def without_orthogonalisation(u: Tensor, h: Tensor, size: Tensor | None, s: StepSettings) -> Tensor:
    """The whitened momentum itself."""
    return spectral_direction(u, h, polar_of=lambda x: x)


def both(**changes: Any) -> Rule:
    """The spectral rule and the damped one beside it, with the same changes."""
    return replace(SPECTRAL, otherwise=replace(DAMPED, **changes), **changes)


# name: contender, settings put over the protocol's, the rule that stands in the table instead. A changed rule
# is none of those that the faster paths know, so the plain path takes it.
PARTS: dict[str, tuple[str, dict[str, Any], Rule | None]] = {
    "spectral": ("sophia-spectral", {}, None),
    "no whitening of the matrices by h": (
        "sophia-spectral",
        {},
        replace(SPECTRAL, direction=without_whitening),
    ),
    "no orthogonalisation": ("sophia-spectral", {}, replace(SPECTRAL, direction=without_orthogonalisation)),
    "no h outside the matrices": ("sophia-spectral", {"gamma": 1e-9}, None),
    "no damping": ("sophia-spectral", {"damping": 0.0}, None),
    "no look-ahead": ("sophia-spectral", {}, both(looks_ahead=False)),
    "no correction of m and h": ("sophia-spectral", {}, both(starts_corrected=False)),
    "damped": ("sophia-damped", {}, None),
    "damped, no damping": ("sophia-damped", {"damping": 0.0}, None),
    "damped, no h": ("sophia-damped", {"gamma": 1e-9}, None),
}


def main(protocol_file: Path, out: Path, steps: int) -> None:
    """Run what is missing, part by part within a seed."""
    protocol = protocol_files.load(protocol_file)
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    done = {(row["part"], row["seed"], row["steps"]) for row in whole_lines(out)}
    for seed in protocol.seeds:
        for part, (contender, settings, rule) in PARTS.items():
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
            instead = {r.name: r for r in (rule, rule and rule.otherwise) if r is not None}
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
    parser.add_argument("protocol", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int, nargs="?", default=200)
    options = parser.parse_args()
    main(options.protocol, options.out, options.steps)
