"""docs/hosts/sentence-transformers.md: embeddings, whose logits are made of several forwards."""

import random

import pytest
import torch
from pages import refreshed, run

pytest.importorskip("sentence_transformers", reason="needs sentence-transformers (extra [hosts])")
datasets = pytest.importorskip("datasets", reason="needs datasets (extra [hosts])")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch.nn.functional import cross_entropy, normalize  # noqa: E402
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: E402

from sophia import Sophia  # noqa: E402
from tiny import LabelsFromLogits, estimate_in_state, oracle, relative_error  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A BERT of one layer with words of its own, pooled to means; from files, as the library loads it."""
    monkeypatch.chdir(tmp_path)  # the trainer writes to "out"
    torch.manual_seed(1)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(tmp_path)
    transformer = Transformer(str(tmp_path))
    return SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").train()


def sentences(number):
    draw = random.Random(number)
    return [" ".join(draw.choices(WORDS, k=5)) for _ in range(number)]


def pairs(number):
    texts = sentences(2 * number)
    return texts[:number], texts[number:]


def test_page_of_the_trainer(model):
    """A module that returns its loss, called by a trainer that knows no logits."""
    first, second = pairs(96)
    rows = [{"first": a, "second": b} for a, b in zip(first, second, strict=True)]
    dataset = datasets.Dataset.from_list(rows)
    _, steps = run("sentence-transformers.md", "The trainer", model=model, dataset=dataset)
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {1}  # one micro-batch of two, each one number


def test_page_of_a_loop(model):
    """Similarities of two forwards as logits, by hand."""
    first, second = pairs(48)
    batches = [(first[i : i + 4], second[i : i + 4]) for i in range(0, 48, 4)]
    _, steps = run(
        "sentence-transformers.md", "Your own loop, with Gauss-Newton", model=model, batches=batches
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4}


def scores(model, batch):
    first, second = (normalize(model(model.preprocess(side))["sentence_embedding"]) for side in batch)
    return 20 * first @ second.T


def test_h_by_hand_is_the_oracle(model):
    """Curvature that comes through one of the two forwards alone."""
    batch = pairs(6)
    expected, count = oracle(model, batch, torch.ones(6, dtype=torch.bool), scores)
    opt = Sophia(model, mode="manual", likelihood=LabelsFromLogits())
    with opt.hessian_pass() as hp:
        hp.sampled_loss(scores(model, batch)).backward()
    assert opt.stats()["B"] == count == 6
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def test_embeddings_are_refused_with_the_way_out(model):
    """Embeddings that are taken for logits in silence."""
    opt = Sophia(model)
    with pytest.raises(RuntimeError, match=r"(?s)(?=.*mode='manual')(?=.*estimator='hutchinson')"):
        cross_entropy(scores(model, pairs(6)), torch.arange(6)).backward()
        opt.step()
    assert not opt.state
