"""One real training step of a recipe's model on this machine's CPU: does it build, and fit the forecast?

    python benchmarks/one_step.py [--recipe gpt2-125m] [--contender sophia-g] [--tokens 256] [--json FILE]

The model has all its parameters; the batch is one sequence of so many random tokens, float32. The first step
of Sophia refreshes h. Linux only (peak of resident memory).
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from sophia.lab.models import build
from sophia.lab.models.size import flops_per_token, parameters
from sophia.lab.optimizers import table
from sophia.lab.protocols import recipe
from sophia.lab.support import provenance


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="gpt2-125m")
    parser.add_argument("--contender", default="sophia-g")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = recipe.find(options.recipe)
    forecast_count = parameters(found.model)
    model = build.build(found.model, seed=1)
    row = table.find(options.contender)
    optimizer = row.build(model, row.settings(found.contenders[options.contender]), 1)
    ids = torch.randint(
        found.model.vocabulary, (1, options.tokens), generator=torch.Generator().manual_seed(1)
    )
    before = [p.detach().clone() for p in model.parameters() if p.ndim == 1]
    start = time.process_time()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradient = time.process_time() - start
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), found.clip))
    start = time.process_time()
    optimizer.step()
    step = time.process_time() - start
    optimizer.zero_grad()
    moved = max(
        float((p.detach() - old).abs().max())
        for p, old in zip((p for p in model.parameters() if p.ndim == 1), before, strict=True)
    )
    with torch.no_grad():
        after = float(model(input_ids=ids, labels=ids).loss)
    count = build.parameter_count(model)
    record = {
        "recipe": options.recipe,
        "contender": options.contender,
        "tokens": options.tokens,
        "parameters": count,
        "forecast_parameters": forecast_count,
        "loss": float(loss.detach()),
        "loss_after": after,
        "gradient_norm": norm,
        "largest_move_of_a_vector_in_lr": moved / found.contenders[options.contender]["lr"],
        "cpu_seconds_gradient": round(gradient, 1),
        "cpu_seconds_step_with_refresh": round(step, 1),
        "gflops_a_second": round(flops_per_token(found.model, count) * options.tokens / gradient / 1e9, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "forecast_weights_state_and_refresh_gb": round(count * 20 / 1e9, 2),
        "stats": optimizer.stats() if hasattr(optimizer, "stats") else {},
        "environment": provenance.describe(threads=1, device="cpu"),
    }
    print(json.dumps(record, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
