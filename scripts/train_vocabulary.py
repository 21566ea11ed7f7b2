"""Learn the shipped vocabulary again: python scripts/train_vocabulary.py [FILE].

Deterministic: the same corpus and the same version of ``tokenizers`` give the same file. Prints the SHA-256
that belongs into ``sophia.lab.data.vocabulary``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from sophia.lab.data import corpus, vocabulary

TARGET = Path(__file__).parents[1] / "src/sophia/lab/data/sotu-4096.txt"


def main() -> None:
    """Train on the training side alone, so that the held-out text has no say in how it is cut."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.SIZE,
        special_tokens=[vocabulary.SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.load("sotu").train, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    data = "".join(f"{left} {right}\n" for left, right in merges).encode()
    target.write_bytes(data)
    print(f"{target}: {len(merges)} merges, {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
