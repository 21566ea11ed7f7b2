"""Architectures of transformers that were always right: B is the count of the model's own loss, h the
oracle's, and nothing is said.

Those whose rows are independent at an eighth of the rows too; the others are in the tables of promises.
"""

import os
import warnings

import pytest
import torch

from tiny import D, LabelsFromLogits, T, V, data, estimate_in_state, oracle, relative_error

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra [lab]")

from sophia import Sophia  # noqa: E402

SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": T}


def modern_bert():
    settings = {"num_attention_heads": 4, "max_position_embeddings": T, "local_attention": 8}
    return transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **SIZES, **settings, cls_token_id=1, sep_token_id=2, reference_compile=False
        )
    )


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    )


def qwen_experts():
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SIZES, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        )
    )


def gemma():
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES,
            **HEADS,
            final_logit_softcapping=3.0,
            attn_logit_softcapping=5.0,
            query_pre_attn_scalar=8,
            attn_implementation="eager",
        )
    )


def rwkv():
    return transformers.RwkvForCausalLM(
        transformers.RwkvConfig(
            vocab_size=V, hidden_size=D, num_hidden_layers=2, context_length=T, use_cache=False
        )
    )


def mamba():
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            chunk_size=8,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )


def xlstm():
    return transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(
            vocab_size=V,
            hidden_size=D,
            embedding_dim=D,
            num_hidden_layers=2,
            num_blocks=2,
            num_heads=4,
            chunkwise_kernel="chunkwise--native_autograd",
            sequence_kernel="native_sequence__native",
            step_kernel="native",
            mode="train",
            chunk_size=8,
            use_cache=False,
        )
    )


def causal(n=16):
    """Whole rows, and labels that the model shifts itself."""
    x, _ = data(n)
    counted = torch.ones(n, T, dtype=torch.bool)
    counted[:, -1] = False
    return {"input_ids": x, "labels": x}, counted


def masked(n=16):
    x, _ = data(n)
    g = torch.Generator().manual_seed(2)
    counted = torch.rand(x.shape, generator=g) < 0.3
    return {"input_ids": x, "labels": x.masked_fill(~counted, -100)}, counted


CASES = {
    "architectures-modernbert": (modern_bert, masked),
    "architectures-mixtral": (mixtral, causal),
    "architectures-qwen3-moe": (qwen_experts, causal),
    "architectures-gemma2-soft-cap": (gemma, causal),
    "architectures-rwkv": (rwkv, causal),
    "architectures-mamba2": (mamba, causal),
    "architectures-xlstm": (xlstm, causal),
}


def built(make):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own, of kernels that are not installed
        return make().train()


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize(("make", "batch"), CASES.values(), ids=CASES)
def test_curvature_of_an_architecture(make, batch):
    """A proof that refuses a model that was right, or another count of its predictions."""
    model, (inputs, counted) = built(make), batch()
    expected, count = oracle(model, None, counted, lambda m, _: m(**inputs).logits)
    opt = Sophia(model, fraction=1.0, likelihood=LabelsFromLogits())
    model(**inputs).loss.backward()
    opt.step()
    assert opt.stats()["B"] == count == int(counted.sum())
    assert relative_error(estimate_in_state(opt), expected) < 1e-4


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize(("make", "batch"), CASES.values(), ids=CASES)
def test_an_eighth_of_the_rows_of_an_architecture(make, batch):
    """Rows that are independent, taken for dependent ones: a refresh would cost eight times as much."""
    model, (inputs, counted) = built(make), batch()
    opt = Sophia(model, update_every=1, lr=1e-4)
    for _ in range(2):
        model(**inputs).loss.backward()
        opt.step()
        opt.zero_grad()
    stats = opt.stats()
    assert (stats["refreshes"], stats["skipped"]) == (2, 0)
    assert stats["B"] < 0.3 * int(counted.sum())
