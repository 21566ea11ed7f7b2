"""Hugging Face models in a plain loop: B is the count of the model's own loss, h the oracle's."""

import os

import pytest
import torch
from torch.nn import functional as F

from tiny import D, LabelsFromLogits, T, V, data, estimate_in_state, oracle, relative_error

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra [lab]")

from needs import torch_from  # noqa: E402
from sophia import Sophia  # noqa: E402
from sophia.refresh.replay import _drawn  # noqa: E402


def gpt2(**settings):
    torch.manual_seed(1)
    no_dropout = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=T,
            n_embd=D,
            n_layer=2,
            n_head=4,
            initializer_range=0.2,
            **no_dropout,
            **settings,
        )
    ).train()


def llama():
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=T,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.2,
        )
    ).train()


def bert():
    torch.manual_seed(1)
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=T,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
    ).train()


def causal_batch():
    """Ids, attention mask, labels with -100 on padding, and which logits are predictions (label t + 1 at
    t).
    """
    x, _ = data()
    g = torch.Generator().manual_seed(3)
    attention = (torch.arange(T)[None] < torch.randint(4, T + 1, (16,), generator=g)[:, None]).long()
    labels = x.masked_fill(attention == 0, -100)
    counted = torch.cat([labels[:, 1:] != -100, torch.zeros(16, 1, dtype=torch.bool)], 1)
    return x, attention, labels, counted


def in_one(model, x, attention, labels, counted):
    model(input_ids=x, attention_mask=attention, labels=labels).loss.backward()


def uneven_with_item_count(model, x, attention, labels, counted):
    total = int(counted.sum())
    for part in torch.arange(16).split([3, 6, 7]):
        model(
            input_ids=x[part], attention_mask=attention[part], labels=labels[part], num_items_in_batch=total
        ).loss.backward()


def smoothed_outside(model, x, attention, labels, counted):
    logits = model(input_ids=x, attention_mask=attention).logits[:, :-1]
    F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    ).backward()


def checkpointed(model, x, attention, labels, counted):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    in_one(model, x, attention, labels, counted)
    model.gradient_checkpointing_disable()


LOOPS = [in_one, uneven_with_item_count, smoothed_outside, checkpointed]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is deprecated:FutureWarning")
@pytest.mark.parametrize("loop", LOOPS, ids=[loop.__name__ for loop in LOOPS])
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2 (tied)", "llama"])
def test_causal_language_models(make, loop):
    """The shift inside the model, -100, and Hugging Face's item count must not enter B."""
    model, batch = make(), causal_batch()
    x, attention, _, counted = batch
    expected, count = oracle(model, x, counted, lambda m, x: m(input_ids=x, attention_mask=attention).logits)
    opt = Sophia(model, fraction=1.0, likelihood=LabelsFromLogits())
    loop(model, *batch)
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def test_masked_language_model():
    """Only the masked positions are predictions (no shift); counting all tokens is a published mistake."""
    model, (x, _) = bert(), data()
    masked = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.15
    expected, count = oracle(model, x, masked, lambda m, x: m(input_ids=x).logits)
    opt = Sophia(model, fraction=1.0, likelihood=LabelsFromLogits())
    model(input_ids=x, labels=x.masked_fill(~masked, -100)).loss.backward()
    opt.step()
    assert opt.stats()["B"] == count == int(masked.sum())
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


# Dynamo looks at logits.grad where a log message of transformers breaks the graph, with or without Sophia.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@torch_from("2.7", "torch.compiler.is_exporting, for which transformers asks in a graph")
def test_compiled_causal_model_with_the_loss_inside():
    """No gradient reaches the logits of a compiled graph: the labels are read, with the model's own shift."""
    torch._dynamo.reset()
    model, (x, attention, labels, counted) = gpt2(), causal_batch()
    expected, count = oracle(model, x, counted, lambda m, x: m(input_ids=x, attention_mask=attention).logits)
    opt = Sophia(model, fraction=1.0, likelihood=LabelsFromLogits())
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=x, attention_mask=attention, labels=labels).loss.backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def test_hutchinson_with_the_item_count_is_the_hessian_of_the_mean():
    """num_items_in_batch divides by the whole batch: added up or averaged, each by the wrong count."""
    batch = causal_batch()
    diagonals = []
    for loop in (in_one, uneven_with_item_count):
        model = gpt2()
        opt = Sophia(model, fraction=1.0, estimator="hutchinson")
        loop(model, *batch)
        opt.step()
        diagonals.append(torch.cat([opt.state[p]["hessian"].flatten() for p in model.parameters()]))
    assert float((diagonals[0] - diagonals[1]).norm() / diagonals[0].norm()) < 1e-5


def test_half_of_the_rows_of_keyword_inputs():
    """Cut alike, on a BatchEncoding-like call."""
    model, (x, attention, labels, counted) = gpt2(), causal_batch()
    rows, share = _drawn([True] * 16, 8, (0, 0, 0, 0, "rows"))
    expected, count = oracle(
        model, x[rows], counted[rows], lambda m, x: m(input_ids=x, attention_mask=attention[rows]).logits
    )
    whole = share * count / int(counted.sum())  # the half stands for the whole
    expected = {p: whole * d for p, d in expected.items()}
    opt = Sophia(model, fraction=0.5, likelihood=LabelsFromLogits())
    in_one(model, x, attention, labels, counted)
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
