"""Tokens a second of the lab's loop against a plain loop around the same model.

    python benchmarks/lab_loop.py [--threads N] [--rounds N] [--json FILE]

The plain loop is what a short training script does (the way of nanoGPT): random windows out of a memory
map, forward, backward, clip, ``AdamW(fused=True)``, and the loss read every ten steps. The lab's has its data
order, schedule, records and checks for divergence on top. Both build the same model anew in each turn and
take the same number of steps of the same shape; compared is the processor time of the steps, turn about.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import records
import torch
from threads import waiting_costs_nothing

from sophia.lab.config.run import Data, Evaluation, Model, Optimizer, Run, Schedule
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.models import build
from sophia.lab.optimizers import table
from sophia.lab.training import loop

SHAPES = {
    # model, sequences, steps a turn
    "0.7M, 16 x 64": (Model(layers=3, width=96, heads=3, context=64), 16, 30),
    "5M, 8 x 256": (Model(layers=4, width=256, heads=4, context=256), 8, 4),
}


def plain(run: Run, ids: tokens.Tokens) -> float:
    """CPU seconds of the steps of the plain loop."""
    model = build.build(run.model, seed=1)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    context, data = run.model.context, ids.train
    start = time.process_time()
    for step in range(run.steps):
        at = torch.randint(len(data) - context, (run.batch,))
        x = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in at])
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            loss.item()
    return time.process_time() - start


def of_the_lab(run: Run, ids: tokens.Tokens) -> float:
    """CPU seconds of the steps of the lab's loop, records and all but for evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        return float(loop.train(run, Path(folder), ids, save_every=run.steps)["cpu_seconds"])


def batches(run: Run, ids: tokens.Tokens) -> float:
    """CPU seconds of making the batches alone."""
    start = time.process_time()
    for step in range(run.steps):
        ids.batch(seed=1, step=step, size=run.batch, context=run.model.context)
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    waiting_costs_nothing(options.threads)
    torch.set_num_threads(options.threads)
    text = corpus.load("sotu")
    ids = tokens.encode(text)
    row = table.find("adamw")
    rows = {}
    for name, (model, batch, steps) in SHAPES.items():
        run = Run(
            data=Data(text.name, text.sha256, vocabulary.SHA256),
            optimizer=Optimizer("adamw", row.settings({"lr": 1e-3})),
            model=model,
            schedule=Schedule(warmup=2),
            evaluation=Evaluation(every=steps, sequences=1),
            steps=steps,
            batch=batch,
            threads=options.threads,
        )
        over, control, each = [], [], []
        for _ in range(options.rounds):
            before, own, after = plain(run, ids), of_the_lab(run, ids), plain(run, ids)
            over.append((before + after) / (2 * own))
            control.append(after / before)
            each.append(own / steps)
        low, middle, high = statistics.quantiles(over, n=4)
        rows[name] = {
            "tokens_per_second_over_plain": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
            "plain_over_itself": round(statistics.median(control), 4),
            "cpu_milliseconds_a_step": round(statistics.median(each) * 1e3, 2),
            "share_of_making_batches": round(batches(run, ids) / steps / statistics.median(each), 5),
        }
        print(f"{name}  {json.dumps(rows[name])}", flush=True)
    records.write(
        options.json,
        threads=options.threads,
        unit="tokens a CPU second of the lab's loop over those of a plain loop, AdamW fused in both, medians "
        "of A B A rounds",
        rounds=options.rounds,
        rows=rows,
    )


if __name__ == "__main__":
    main()
