"""Models by ``transformers``, from their configuration alone; nothing is fetched."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from sophia.lab.config.run import Model
from sophia.refresh.seeds import seed_for

__all__ = ["build", "gpt2", "parameter_count"]


def build(config: Model, *, seed: int) -> nn.Module:
    """A model whose initial weights depend on (config, seed) alone; the global random state is left as it
    was. Under ``torch.device("meta")`` it has shapes and no numbers.

    Call it ``model(input_ids=x, labels=x)`` with x of shape (sequences, context): it shifts the labels itself
    and gives ``.loss``, the mean over sequences x (context - 1) predictions, and ``.logits``.
    """
    make = _gpt2 if config.kind == "gpt2" else _neox
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed_for("initialisation", seed))
        model = make(config)
    assert isinstance(model, nn.Module)
    # Said, because transformers logs a warning where it has to guess.
    model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    return model.train()


def gpt2(config: Model, *, seed: int) -> nn.Module:
    """A GPT-2; see ``build``."""
    return build(config, seed=seed)


def _gpt2(config: Model) -> Any:
    # transformers takes 2 s to import, which asking for help should not cost; and makes tensors while it is
    # imported, which must not be of the device "meta" where a model is built on that.
    with torch.device("cpu"):
        from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocabulary,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            scale_attn_by_inverse_layer_idx=config.scale_attention_by_layer,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )
    _scale_initial(model, config)
    return model


@torch.no_grad()
def _scale_initial(model: Any, config: Model) -> None:
    """Multiply initial weights; factors of 1, as of all runs but those of one experiment, touch nothing."""
    if config.initial_scale != 1:
        for weights in model.parameters():  # tied ones come once
            if weights.ndim > 1:
                weights.mul_(config.initial_scale)
    if config.initial_query_key_scale != 1:
        for block in model.transformer.h:  # columns: queries, keys, values
            block.attn.c_attn.weight[:, : 2 * config.width].mul_(config.initial_query_key_scale)


def _neox(config: Model) -> Any:
    with torch.device("cpu"):
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocabulary,
            max_position_embeddings=config.context,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act="gelu_pytorch_tanh",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def parameter_count(model: nn.Module) -> int:
    """Trained numbers; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
