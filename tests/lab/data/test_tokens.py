import numpy as np
import pytest
import torch

from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.support.errors import LabError, UsageError

ODD = ["", "Grüße, 世界 \U0001f600", "\tdef f(x):\r\n\n    return x\x07", "<|endoftext|>", "a" * 5000]


@pytest.mark.parametrize("text", ODD)
def test_every_text_comes_back(text):
    """Else bits per byte would be of another text."""
    from tokenizers import decoders

    tokenizer = vocabulary.tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    lengths = vocabulary.byte_lengths()
    assert sum(lengths[i] for i in ids) == len(text.encode())
    assert 0 not in ids  # what looks like a separator is plain text


def test_the_vocabulary_is_whole():
    """Else ids would not fit the model, or two tokens would be the same."""
    assert vocabulary.tokenizer().get_vocab_size() == vocabulary.SIZE == len(vocabulary.byte_lengths())


def test_a_changed_vocabulary_file_is_refused(monkeypatch):
    """Else losses would silently be of another tokenization."""
    monkeypatch.setattr(vocabulary, "SHA256", "0" * 64)
    with pytest.raises(LabError, match="changed or damaged"):
        vocabulary.merges()


def test_batches_depend_on_seed_and_step_alone(ids):
    """Else contenders would read different text, and a resumed run would read it in another order."""
    fresh = tokens.Tokens(ids.train, ids.validation)
    late = fresh.batch(seed=3, step=7, size=4, context=16)
    for step in range(8):
        last = ids.batch(seed=3, step=step, size=4, context=16)
    assert torch.equal(last, late)
    assert not torch.equal(late, ids.batch(seed=4, step=7, size=4, context=16))
    assert late.dtype == torch.int64


def test_an_epoch_reads_each_token_at_most_once(ids):
    """Else some text would count twice, and the number of epochs in the report would be wrong."""
    small = tokens.Tokens(np.arange(1000, dtype=np.uint16), ids.validation)
    epoch = torch.cat([small.batch(seed=1, step=s, size=2, context=10) for s in range(49)]).flatten()
    assert len(epoch.unique()) == len(epoch) == 980


def test_exactly_one_sequence_is_enough_and_less_is_refused(ids):
    """Else a short text would end in an index error."""
    side = np.arange(1, 17, dtype=np.uint16)
    short = tokens.Tokens(side, side)
    short.require(16, "The text")
    assert short.batch(seed=1, step=5, size=2, context=16).tolist() == [side.tolist()] * 2
    assert short.held_out(sequences=9, context=16)[0].shape == (1, 16)
    with pytest.raises(UsageError, match="16 tokens, fewer than one sequence of 17"):
        short.require(17, "The text")


def test_bits_per_byte_counts_the_predicted_bytes(text, ids):
    """Else losses would not compare across vocabularies."""
    held, bytes_ = ids.held_out(sequences=10**9, context=8)
    lengths = vocabulary.byte_lengths()
    assert bytes_ == sum(lengths[i] for row in held.tolist() for i in row[1:])
    assert tokens.bits_per_byte(np.log(2), predictions=8, bytes_=4) == pytest.approx(2)


def test_the_separator_stands_before_each_document(text, ids):
    """Else documents would run into each other."""
    assert int((np.asarray(ids.train) == 0).sum()) == len(text.train)


def test_a_damaged_cache_is_made_again(cache):
    """Else a killed first run would spoil all later ones."""
    own = corpus.Corpus("own", "", ("we the people " * 50,), ("of the states",))
    made = tokens.encode(own).train.tolist()
    for path in sorted(cache.glob("tokens-*-train.npy"), key=lambda p: p.stat().st_mtime_ns)[-1:]:
        path.unlink()  # a mapped file must not shrink under its reader
        path.write_bytes(b"\x93NUMPY\x01\x00")
    assert tokens.open_cached(own.sha256) is None
    assert tokens.encode(own).train.tolist() == made


def test_the_cache_folder_can_be_moved(monkeypatch, tmp_path):
    """Else a read-only home would stop the lab."""
    monkeypatch.delenv("SOPHIA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokens.cache_folder() == tmp_path / "sophia"


def test_unigram_entropy_is_that_of_the_counts():
    """Else the report would compare models with a wrong mark."""
    side = np.array([1, 2] * 500, dtype=np.uint16)
    entropy = tokens.Tokens(side, side).unigram_entropy()
    share = 501 / (1000 + vocabulary.SIZE)
    assert entropy == pytest.approx(-np.log(share))


def test_own_text_is_encoded_with_the_shipped_vocabulary(text, ids):
    """Else a run's configuration would not say how its text was cut."""
    own = corpus.Corpus("own", "", ("the people",), ("of the states",))
    made = tokens.encode(own)
    assert made.train.tolist() == [0, *vocabulary.tokenizer().encode("the people").ids]


def test_bytes_are_tokens_too():
    """Else an experiment on bytes would read something else than its text, or count its bits wrongly."""
    own = corpus.Corpus("own", "", ("aé", "b"), ("c" * 40,))
    made = tokens.as_bytes(own)
    assert made.train.tolist() == [0, *"aé".encode(), 0, *b"b"]
    rows, size = made.held_out(sequences=2, context=8)
    assert size == rows[:, 1:].numel() == 14
    counts = np.bincount(made.train, minlength=256) + 1.0
    assert made.unigram_entropy() == pytest.approx(-np.log((counts / counts.sum())[made.validation]).mean())
