"""What a comparison will do, decided and written down before its first run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sophia.lab.config.field_types import Device
from sophia.lab.config.run import Data, Run, Setting
from sophia.lab.data import vocabulary
from sophia.lab.data.corpus import Corpus
from sophia.lab.data.tokens import Tokens
from sophia.lab.optimizers.contender import Contender
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.support.dataclass_json import canonical, to_json
from sophia.lab.support.errors import UsageError

__all__ = ["Plan", "about", "make_plan", "parse_settings"]


@dataclass(frozen=True)
class Plan:
    """The protocol, the facts of its text, and the runs."""

    protocol: Protocol
    data: Mapping[str, Any]
    runs: tuple[Run, ...]
    """In the order in which they are done."""

    @property
    def contenders(self) -> tuple[str, ...]:
        """The baseline first."""
        return self.protocol.names

    @property
    def budgets(self) -> tuple[int, ...]:
        """Steps, ascending."""
        return tuple(sorted(self.protocol.budgets))

    def to_json(self) -> dict[str, Any]:
        """The content of comparison.json."""
        first = {run.optimizer.contender: run for run in reversed(self.runs)}
        return {
            "version": 1,
            "preset": self.protocol.name,
            "contenders": list(self.contenders),
            "baseline": self.protocol.baseline,
            "seeds": list(self.protocol.seeds),
            "budgets": list(self.budgets),
            "data": dict(self.data),
            "model": to_json(self.protocol.model),
            "batch": self.protocol.batch,
            "settings": {name: dict(first[name].optimizer.settings) for name in self.contenders},
            "runs": [
                {"contender": r.optimizer.contender, "seed": r.seed, "steps": r.steps, "run": r.hash}
                for r in self.runs
            ],
        } | ({} if self.protocol.target is None else {"target": self.protocol.target})

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits that name this comparison."""
        content = {"comparison": self.to_json(), "protocol": to_json(self.protocol)}
        return hashlib.sha256(canonical(content).encode()).hexdigest()[:8]


def make_plan(protocol: Protocol, corpus: Corpus, tokens: Tokens, *, device: Device = "cpu") -> Plan:
    """Every contender at every budget and seed; for each seed all start from the same weights and read the
    same batches.

    Raises ``UsageError`` for what cannot be planned.
    """
    protocol.check()
    data = Data(corpus.name, corpus.sha256, vocabulary.SHA256)
    runs = tuple(
        protocol.run(name, data=data, seed=seed, steps=steps, device=device)
        for seed in protocol.seeds
        for steps in sorted(protocol.budgets, reverse=True)  # long ones first: the workers end together
        for name in protocol.names
    )
    # The records say which text it was by its hash; where it lay is nobody's business.
    return Plan(replace(protocol, data=corpus.name), about(corpus, tokens), runs)


def about(corpus: Corpus, tokens: Tokens) -> dict[str, Any]:
    """The facts of a text that its records keep."""
    return {
        "corpus": corpus.name,
        "about": corpus.about,
        "text_sha256": corpus.sha256,
        "vocabulary_sha256": vocabulary.SHA256,
        "bytes": corpus.bytes,
        "train_tokens": len(tokens.train),
        "validation_tokens": len(tokens.validation),
        "unigram_nats": round(tokens.unigram_entropy(), 4),
    }


def parse_settings(
    lr: Sequence[str], settings: Sequence[str], row: Callable[[str], Contender]
) -> dict[str, dict[str, Setting]]:
    """From ``name=value`` learning rates and ``name.setting=value`` pairs to settings by contender; ``row``
    finds a contender by its name.

    >>> from sophia.lab.optimizers.table import find
    >>> parse_settings(["adamw=2e-3"], ["sophia-g.gamma=0.1", "sophia-g.update_every=5"], find)
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
        defaults = row(name).defaults
        if setting not in defaults:
            raise UsageError(
                f"{option} {pair}: {name} has no setting {setting!r}. Its settings are {', '.join(defaults)}."
            )
        kind = type(defaults[setting])
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
