"""Text as token ids, and ids as batches.

The encoded corpus is one long line of ids for each side, documents joined by a separator, kept as uint16 in a
cache that can be deleted at any time. Batches are a pure function of (seed, step): nothing to save, exact on
resume, and every contender of a comparison reads the same ones.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sophia.lab.data import vocabulary
from sophia.lab.data.corpus import Corpus
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import write_atomically
from sophia.refresh.seeds import seed_for

__all__ = ["BYTES", "Tokens", "as_bytes", "bits_per_byte", "cache_folder", "encode", "open_cached"]

Ids = NDArray[np.uint16]

BYTES = "bytes"
"""The name, in place of a vocabulary's hash, of the vocabulary in which a token is a byte."""


@dataclass(frozen=True)
class Tokens:
    """The two sides of a corpus as ids."""

    train: Ids
    validation: Ids
    lengths: NDArray[np.int64] | None = None
    """Bytes of each token, 0 if they are not known; None: those of the shipped vocabulary."""
    _order: dict[tuple[int, int, int], NDArray[np.int64]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def require(self, context: int, name: str) -> None:
        """Raise ``UsageError`` unless both sides hold a sequence."""
        for side, ids in (("training", self.train), ("held-out", self.validation)):
            if len(ids) < context:
                raise UsageError(
                    f"{name} is too short: its {side} side has {len(ids)} tokens, fewer than one sequence "
                    f"of {context}. "
                    "Give a longer text."
                )

    def batch(self, *, seed: int, step: int, size: int, context: int) -> torch.Tensor:
        """The ids of one step, int64 (size, context).

        An epoch cuts the text into sequences at a random offset and reads each once, in a random order.
        """
        rows = []
        for index in range(step * size, (step + 1) * size):
            per_epoch = max(1, len(self.train) // context - 1)  # one is given up for the offset
            epoch, place = divmod(index, per_epoch)
            start = self._starts(seed, epoch, context, per_epoch)[place]
            rows.append(self.train[start : start + context])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _starts(self, seed: int, epoch: int, context: int, per_epoch: int) -> NDArray[np.int64]:
        key = (seed, epoch, context)
        if key not in self._order:
            self._order.clear()  # only the current epoch is read again
            random = np.random.Generator(np.random.PCG64(seed_for("order", seed, epoch)))
            slack = len(self.train) - per_epoch * context
            offset = int(random.integers(0, min(context, slack) + 1)) if slack > 0 else 0
            self._order[key] = random.permutation(per_epoch) * context + offset
        return self._order[key]

    def held_out(self, *, sequences: int, context: int) -> tuple[torch.Tensor, int]:
        """Evenly spread held-out sequences, int64 (n, context) with n <= sequences, and the bytes they
        predict.

        The first token of a sequence is given, not predicted, so its bytes do not count.
        """
        windows = len(self.validation) // context
        count = min(sequences, windows)
        starts = (np.arange(count) * windows // count) * context
        rows = np.stack([self.validation[s : s + context] for s in starts]).astype(np.int64)
        lengths = (
            np.array(vocabulary.byte_lengths(), dtype=np.int64) if self.lengths is None else self.lengths
        )
        return torch.from_numpy(rows), int(lengths[rows[:, 1:]].sum())

    def unigram_entropy(self) -> float:
        """Nats per held-out token of the best model without context: what a model must fall clearly below."""
        size = vocabulary.SIZE if self.lengths is None else len(self.lengths)
        counts = np.bincount(self.train, minlength=size).astype(np.float64) + 1
        return float(-np.log(counts / counts.sum())[self.validation].mean())


def bits_per_byte(loss: float, *, predictions: int, bytes_: int) -> float | None:
    """A mean loss in nats per prediction as bits per byte of the text predicted; comparable across
    vocabularies. None where the number of bytes is not known and given as 0.
    """
    if bytes_ == 0:
        return None
    return loss * predictions / (math.log(2) * bytes_)


def cache_folder() -> Path:
    """``$SOPHIA_CACHE``, or ``sophia`` in the cache folder of the user."""
    if own := os.environ.get("SOPHIA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sophia"


def encode(corpus: Corpus) -> Tokens:
    """Encode a corpus with the shipped vocabulary, or read it from the cache. Takes some 10 s for 12 MB."""
    if (cached := open_cached(corpus.sha256)) is not None:
        return cached
    tokenizer = vocabulary.tokenizer()
    separator = 0  # the first token of the vocabulary
    for side, documents in (("train", corpus.train), ("validation", corpus.validation)):
        # encode_batch uses all cores; the separator cannot come out of the text, where it is plain
        # characters.
        ids: list[int] = []
        for encoding in tokenizer.encode_batch_fast(list(documents), add_special_tokens=False):
            ids.append(separator)
            ids.extend(encoding.ids)
        array = np.array(ids, dtype=np.uint16)
        write_atomically(_file(corpus.sha256, side), partial(np.save, arr=array))
    tokens = open_cached(corpus.sha256)
    assert tokens is not None, "both files were just written"
    return tokens


def as_bytes(corpus: Corpus) -> Tokens:
    """A corpus as its UTF-8 bytes, 256 different tokens, documents joined by a zero byte: small models learn
    from these in few steps.
    """
    train, validation = (
        np.frombuffer("".join(f"\0{d}" for d in documents).encode(), dtype=np.uint8).astype(np.uint16)
        for documents in (corpus.train, corpus.validation)
    )
    return Tokens(train, validation, lengths=np.ones(256, dtype=np.int64))


def open_cached(text: str) -> Tokens | None:
    """The ids of a text by its SHA-256, mapped from the cache; None if they are not there or not whole."""
    sides = []
    for side in ("train", "validation"):
        try:
            array = np.load(_file(text, side), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if array.dtype != np.uint16 or array.ndim != 1:
            return None
        sides.append(array)
    return Tokens(*sides)


def _file(text: str, side: str) -> Path:
    key = hashlib.sha256(f"{text} {vocabulary.SHA256}".encode()).hexdigest()[:16]
    return cache_folder() / f"tokens-{key}-{side}.npy"
