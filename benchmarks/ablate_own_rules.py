"""What each part of the spectral and the damped rule is worth: one at a time taken out, over paired seeds.

    python benchmarks/ablate_own_rules.py PROTOCOL.toml OUT.jsonl [STEPS]

The settings are those of the protocol for both rules. Appends a line for each run to OUT.jsonl as it ends; a
run that is in the file is not made again. One thread.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import records
import torch

from sophia import update_rule
from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.protocols import protocol_file as protocol_files
from sophia.lab.training import loop
from sophia.step import dispatch
from sophia.step.kernels import own_rules

# name: contender, settings put over the protocol's, (module, name, what stands there instead)
PARTS: dict[str, tuple[str, dict[str, Any], list[tuple[Any, str, Any]]]] = {
    "spectral": ("sophia-spectral", {}, []),
    "no whitening of the matrices by h": (
        "sophia-spectral",
        {},
        [(update_rule, "_whitening", torch.ones_like)],
    ),
    "no orthogonalisation": ("sophia-spectral", {}, [(own_rules, "polar_of", lambda x: x)]),
    "no h outside the matrices": ("sophia-spectral", {"gamma": 1e-9}, []),
    "no damping": ("sophia-spectral", {"damping": 0.0}, []),
    "no look-ahead": ("sophia-spectral", {}, [(own_rules, "look_ahead", lambda m, g, beta1: m)]),
    "no correction of m and h": (
        "sophia-spectral",
        {},
        [(dispatch, "corrected_gamma", lambda gamma, **_: gamma)],
    ),
    "damped": ("sophia-damped", {}, []),
    "damped, no damping": ("sophia-damped", {"damping": 0.0}, []),
    "damped, no h": ("sophia-damped", {"gamma": 1e-9}, []),
}


@contextmanager
def instead(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Take parts out; the path in blocks, which has them built in, stands aside."""
    with mock.patch.object(own_rules.foreach, "applies", return_value=False):
        patches = [mock.patch.object(*replacement) for replacement in replacements]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def main(protocol_file: Path, out: Path, steps: int) -> None:
    """Run what is missing, part by part within a seed."""
    protocol = protocol_files.load(protocol_file)
    text = corpus.load(protocol.data)
    ids = tokens.encode(text)
    done = {(row["part"], row["seed"], row["steps"]) for row in records.lines(out)}
    for seed in protocol.seeds:
        for part, (contender, settings, replacements) in PARTS.items():
            if (part, seed, steps) in done:
                continue
            run = protocol.run(
                contender,
                data=Data(text.name, text.sha256, vocabulary.SHA256),
                seed=seed,
                steps=steps,
                device="cpu",
            )
            named = dataclasses.replace(run.optimizer, settings={**run.optimizer.settings, **settings})
            run = dataclasses.replace(run, optimizer=named)
            with tempfile.TemporaryDirectory() as folder, instead(replacements):
                result = loop.train(run, Path(folder), ids)
            row = {
                "part": part,
                "seed": seed,
                "steps": steps,
                "loss": result["loss"],
                "settings": named.settings,
            }
            records.append(out, row)
            print(f"{part}, seed {seed}: {result['loss']}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 200)
