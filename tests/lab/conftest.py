"""A text of our own, encoded in a cache of the test session, and runs on it that take a second."""

import dataclasses
import random

import pytest

from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.protocols import protocol_file

WORDS = [
    "the",
    "people",
    "of",
    "states",
    "congress",
    "shall",
    "have",
    "power",
    "to",
    "regulate",
    "trade",
    "peace",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A UTF-8 file of 4,000 lines."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=9)) + ".\n" for _ in range(4000)]
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Where the session keeps its tokens; never the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOPHIA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def text(text_file):
    return corpus.load(str(text_file))


@pytest.fixture(scope="session")
def ids(text, cache):
    return tokens.encode(text)


@pytest.fixture(scope="session")
def tiny(text):
    """``tiny(contender, steps=24, over={...}, **changes)``: the configuration of a run."""

    def make(contender="adamw", *, steps=24, seed=1, over=None, **changes):
        data = Data(text.name, text.sha256, vocabulary.SHA256)
        protocol = protocol_file.chosen("tiny", None).with_contenders([contender])
        config = protocol.run(contender, data=data, seed=seed, steps=steps, over=over)
        return dataclasses.replace(config, **changes)

    return make
