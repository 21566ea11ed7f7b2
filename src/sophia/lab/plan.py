"""What a comparison will do, decided and written down before its first run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sophia.lab import recipes, vocabulary
from sophia.lab.config import Data, Run, Setting, canonical, to_json
from sophia.lab.contenders import find
from sophia.lab.corpus import Corpus
from sophia.lab.errors import UsageError
from sophia.lab.tokens import Tokens

__all__ = ["BASELINE", "Plan", "make_plan", "parse_settings"]

BASELINE = "adamw"

Overrides = Mapping[str, Mapping[str, Setting]]


@dataclass(frozen=True)
class Plan:
    """The runs of a comparison, and everything about it that its report needs."""

    preset: str
    contenders: tuple[str, ...]
    """The baseline first."""
    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    """Steps, ascending."""
    data: Mapping[str, Any]
    runs: tuple[Run, ...]
    """In the order in which they are done."""

    def to_json(self) -> dict[str, Any]:
        """The content of comparison.json."""
        first = {run.optimizer.contender: run for run in reversed(self.runs)}
        return {
            "version": 1,
            "preset": self.preset,
            "contenders": list(self.contenders),
            "baseline": self.contenders[0],
            "seeds": list(self.seeds),
            "budgets": list(self.budgets),
            "data": dict(self.data),
            "model": to_json(self.runs[0].model),
            "batch": self.runs[0].batch,
            "settings": {name: dict(first[name].optimizer.settings) for name in self.contenders},
            "runs": [
                {"contender": r.optimizer.contender, "seed": r.seed, "steps": r.steps, "run": r.hash}
                for r in self.runs
            ],
        }

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits that name this comparison."""
        return hashlib.sha256(canonical(self.to_json()).encode()).hexdigest()[:8]


def make_plan(
    corpus: Corpus,
    tokens: Tokens,
    *,
    preset: str,
    contenders: Sequence[str],
    seeds: int | None = None,
    budgets: Sequence[int] = (),
    over: Overrides | None = None,
    device: str = "cpu",
) -> Plan:
    """Every contender at every budget and seed; for each seed all start from the same weights and read the
    same batches.

    The baseline is put first if it was left out. Raises ``UsageError`` for what cannot be planned.
    """
    size = recipes.preset(preset)
    names = tuple(dict.fromkeys((BASELINE, *contenders) if BASELINE not in contenders else contenders))
    names = (BASELINE, *(name for name in names if name != BASELINE))
    for name in names:
        find(name)
    for name in over or {}:
        if name not in names:
            raise UsageError(
                f"A setting is given for {name!r}, which is not in this comparison, so it would have no "
                f"effect. "
                f"The contenders are {', '.join(names)}; add {name} to them, or leave its setting out."
            )
    count = size.seeds if seeds is None else seeds
    if count < 1:
        raise UsageError(
            f"--seeds is {count}, and a comparison without a run compares nothing. Use 2 or more."
        )
    chosen = tuple(sorted(set(budgets))) or size.budgets
    data = Data(corpus.name, corpus.sha256, vocabulary.SHA256)
    runs = tuple(
        recipes.run(
            size,
            contender=name,
            data=data,
            seed=seed,
            steps=steps,
            over=(over or {}).get(name),
            device=device,
        )
        for seed in range(1, count + 1)
        for steps in reversed(chosen)  # long ones first, so that the workers end together
        for name in names
    )
    about = {
        "corpus": corpus.name,
        "about": corpus.about,
        "text_sha256": corpus.sha256,
        "vocabulary_sha256": vocabulary.SHA256,
        "bytes": corpus.bytes,
        "train_tokens": len(tokens.train),
        "validation_tokens": len(tokens.validation),
        "unigram_nats": round(tokens.unigram_entropy(), 4),
    }
    return Plan(preset, names, tuple(range(1, count + 1)), chosen, about, runs)


def parse_settings(lr: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, Setting]]:
    """From ``name=value`` learning rates and ``name.setting=value`` pairs to settings by contender.

    >>> parse_settings(["adamw=2e-3"], ["sophia-g.gamma=0.1", "sophia-g.update_every=5"])
    {'adamw': {'lr': 0.002}, 'sophia-g': {'gamma': 0.1, 'update_every': 5}}
    """
    over: dict[str, dict[str, Setting]] = {}
    pairs = [("--lr", "sophia-g=1e-3", pair, *_lr(pair)) for text in lr for pair in text.split(",")]
    pairs += [("--set", "sophia-g.gamma=0.1", p, *_setting(p)) for text in settings for p in text.split(",")]
    for option, example, pair, name, setting, text in pairs:
        if not (name and setting and text):
            raise UsageError(
                f"{option} {pair}: it is not clear whose value this is. Write {option} {example}."
            )
        row = find(name)
        if setting not in row.defaults:
            raise UsageError(
                f"{option} {pair}: {name} has no setting {setting!r}. Its settings are "
                f"{', '.join(row.defaults)}."
            )
        kind = type(row.defaults[setting])
        try:
            value = kind(text)
        except ValueError:
            raise UsageError(
                f"{option} {pair}: {text!r} is no {kind.__name__}. Write {option} {example}."
            ) from None
        if setting.endswith("lr") and not 0 < float(value) < float("inf"):
            raise UsageError(
                f"{option} {pair}: a learning rate is above 0 and finite. Write {option} {example}."
            )
        if isinstance(value, float) and value != value:
            raise UsageError(f"{option} {pair}: nan is no value. Write {option} {example}.")
        over.setdefault(name, {})[setting] = value
    return over


def _lr(pair: str) -> tuple[str, str, str]:
    name, _, text = pair.partition("=")
    return name, "lr", text


def _setting(pair: str) -> tuple[str, str, str]:
    left, _, text = pair.partition("=")
    name, _, setting = left.partition(".")
    return name, setting, text
