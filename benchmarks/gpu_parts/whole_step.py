"""A whole training step of GPT-2 124M in bfloat16 autocast over AdamW's, refreshes included, and its peak.

The trainers of ``sophia bench``: forward, backward, clipping, step; every second step refreshes, so that both
kinds are timed, and a tenth of the difference is what refreshes add at k = 10.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_parts.scene import ABSENT, Scene, say

from sophia.lab.bench.methods import METHODS, REFERENCE, Trainer
from sophia.lab.bench.problem import Problem
from sophia.lab.bench.timing import amortised, training_steps
from sophia.lab.models import build

NAMES = (REFERENCE, "sophia", "sophia, damped", "sophia, spectral", "torch Muon, AdamW")
ROUNDS = 8
EVERY = {name: 5 if name == "sophia, spectral" else 10 for name in NAMES}
"""Steps between two refreshes or decompositions; the trainers have two, and both kinds are timed apart."""
ROWS = (32, 16, 8, 4)


class Autocast(Problem):
    """A problem whose forward runs in bfloat16."""

    def forward(self) -> Any:
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16):
            return super().forward()


def trainer(name: str, scene: Scene, rows: int) -> Trainer:
    """A model of its own with its optimizer and one batch."""
    config = scene.model("gpt2-125m")
    with torch.device(scene.device):
        model = build.build(config, seed=1)
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocabulary, (rows, config.context), generator=made).to(scene.device)
    return METHODS[name].make(Autocast(model, {"input_ids": ids, "labels": ids}))


def peak(own: Trainer, scene: Scene, others: int) -> int | str:
    """Bytes out at the peak of two training steps, one with a refresh, without what others hold."""
    own.step(), own.step()

    def both() -> None:
        own.step(), own.step()

    before = 0 if scene.toy else torch.cuda.memory_allocated()
    above = scene.peak_above(both)
    return above if isinstance(above, str) else before - others + above


def compared(scene: Scene, rows: int) -> dict[str, Any]:
    """All methods on micro-batches of so many rows."""
    reference = trainer(REFERENCE, scene, rows)
    found: dict[str, Any] = {REFERENCE: {"peak_bytes": peak(reference, scene, 0)}}
    for name in NAMES[1:]:
        missing = METHODS[name].missing or ("there was no time for it" if scene.left() <= 0 else None)
        if missing is not None:
            found[name] = {"missing": missing}
            continue
        scene.release()
        others = 0 if scene.toy else torch.cuda.memory_allocated()
        own = trainer(name, scene, rows)
        own_peak = peak(own, scene, others)
        timed = training_steps(own, reference, rounds=2 if scene.toy else ROUNDS, clock=scene.clock())
        found[name] = row = {
            "training_step": timed.plain.to_json(),
            "refreshing_step": None if timed.refreshing is None else timed.refreshing.to_json(),
            "amortised": round(amortised(timed, EVERY[name]), 5),
            "peak_bytes": own_peak,
        }
        if timed.refreshing is not None:
            row["refreshes_add"] = round((timed.refreshing.median - timed.plain.median) / EVERY[name], 5)
        if not isinstance(own_peak, str):
            row["peak_over_adamw"] = round(own_peak / found[REFERENCE]["peak_bytes"], 3)
        say(f"{name:20s} {row['amortised']:.4f} of AdamW's step, peak {row.get('peak_over_adamw', ABSENT)}")
        del own
    return found


def measure(scene: Scene) -> dict[str, Any]:
    """With the largest micro-batch that fits."""
    for rows in (4,) if scene.toy else ROWS:
        try:
            found = compared(scene, rows)
        except torch.OutOfMemoryError:
            say(f"{rows} rows do not fit")
        else:
            ours = found["sophia"]
            return {
                "unit": "a whole training step over AdamW's, turn about, in bfloat16 autocast; medians and "
                "quartiles of rounds; fraction 1/8",
                "steps_between_refreshes": EVERY,
                "rows_of_the_batch": rows,
                "context": scene.model("gpt2-125m").context,
                "methods": found,
                "says": f"refreshes add {ours.get('refreshes_add')} of AdamW's step, the whole is "
                f"{ours.get('amortised')} of it; peak {ours.get('peak_over_adamw', ABSENT)}",
            }
        scene.release()
    raise RuntimeError(f"not even {ROWS[-1]} rows fit")
