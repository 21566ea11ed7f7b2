"""What the hosts of the examples train: small models of transformers, and their data."""

from __future__ import annotations

import os

import torch

from tiny import D, T, V, data

os.environ.setdefault("HF_HUB_OFFLINE", "1")
COUNTED = T - 1  # predictions in a row: the model shifts its labels by one


def gpt2(**settings):
    """A GPT-2 of two layers, without dropout."""
    import transformers

    torch.manual_seed(1)
    settings = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "vocab_size": V,
        "n_positions": T,
        "n_embd": D,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.2,
        "loss_type": "ForCausalLM",
        **settings,
    }
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).train()


def rows(number):
    """A dataset of ``number`` rows: ids, and the same as labels."""
    return [{"input_ids": x, "labels": x} for x in data(number)[0]]


def loader(number, *, batch_size):
    """The same in batches, in order."""
    return torch.utils.data.DataLoader(rows(number), batch_size=batch_size)


def pairs(number, *, batch_size):
    """Ids and next ids in batches, in order, for ``tiny.GPT``."""
    return torch.utils.data.DataLoader(list(zip(*data(number), strict=True)), batch_size=batch_size)
