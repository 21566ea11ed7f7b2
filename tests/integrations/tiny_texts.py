"""Texts, a tokenizer and a Llama for the trainers of TRL: nothing is loaded from anywhere."""

from __future__ import annotations

import random

import torch

from tiny import D

WORDS = [f"w{number}" for number in range(30)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def tokenizer():
    """Whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama(seed=1):
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(WORDS),
            hidden_size=D,
            intermediate_size=2 * D,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            initializer_range=0.2,
        )
    )


def text(draw: random.Random, words: int) -> str:
    """So many random words."""
    return " ".join(draw.choices(WORDS, k=words))
