"""A folder of token files: ``train.bin`` and ``val.bin``, unsigned 16-bit numbers in the machine's order.

It is the format of nanoGPT's ``prepare.py``, which makes OpenWebText so. Nothing is fetched here: bring the
files, or write them from any tokenizer with ``numpy.array(ids, dtype=numpy.uint16).tofile(path)``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from sophia.lab.config.run import Data
from sophia.lab.data.tokens import Tokens
from sophia.lab.support.errors import UsageError

__all__ = ["FILES", "SAMPLES", "read", "write"]

FILES = {"train": "train.bin", "validation": "val.bin"}
SAMPLES = 1024
"""Pieces of 4 KiB, evenly spread, whose hash stands for a file: 18 GB would take minutes to read whole."""


def read(folder: Path, *, name: str, vocabulary: str, size: int) -> tuple[Tokens, Data]:
    """Map the files of a folder, and say which they are. ``size`` is the number of different tokens.

    Raises ``UsageError`` for files that are missing, cut short, or of another vocabulary (in their samples).
    """
    digest, sides = hashlib.sha256(), {}
    for side, file in FILES.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size % 2 or not path.stat().st_size:
            raise UsageError(
                f"{path} is no file of 16-bit tokens. Give a folder with {' and '.join(FILES.values())}, as "
                "docs/recipes.md says."
            )
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        digest.update(len(ids).to_bytes(8, "little"))
        for start in np.linspace(0, max(0, len(ids) - 2048), SAMPLES).astype(np.int64):
            piece = np.array(ids[start : start + 2048])
            if int(piece.max()) >= size:
                raise UsageError(
                    f"{path} holds the token {int(piece.max())}, but the model has {size} different ones. "
                    "Take the files of that vocabulary, or set model.vocabulary in a copy of the recipe."
                )
            digest.update(piece.tobytes())
        sides[side] = ids
    tokens = Tokens(sides["train"], sides["validation"], lengths=np.zeros(size, dtype=np.int64))
    return tokens, Data(name, digest.hexdigest(), vocabulary)


def write(folder: Path, tokens: Tokens) -> None:
    """Write both sides, for instance to try a recipe on the built-in text.

    >>> from sophia.lab.data import corpus, token_files, tokens
    >>> text = tokens.encode(corpus.load("sotu"))          # doctest: +SKIP
    >>> token_files.write(Path("tokens"), text)            # doctest: +SKIP
    """
    folder.mkdir(parents=True, exist_ok=True)
    for side, file in FILES.items():
        np.asarray(getattr(tokens, side)).tofile(folder / file)
