"""Models: a GPT-2 by ``transformers``, from its configuration alone; nothing is fetched."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from sophia.lab.config import Model
from sophia.noise import seed_for

__all__ = ["gpt2", "parameter_count"]


def gpt2(config: Model, *, seed: int) -> nn.Module:
    """A GPT-2 whose initial weights depend on (config, seed) alone; the global random state is left as it
    was.

    Call it ``model(input_ids=x, labels=x)`` with x of shape (sequences, context): it shifts the labels itself
    and gives ``.loss``, the mean over sequences x (context - 1) predictions, and ``.logits``.
    """
    # transformers takes 2 s to import, which asking for help should not cost.
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed_for("initialisation", seed))
        model = GPT2LMHeadModel(settings)
    assert isinstance(model, nn.Module)
    # Said, because transformers logs a warning where it has to guess.
    model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    return model.train()


def parameter_count(model: nn.Module) -> int:
    """Trained numbers; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
