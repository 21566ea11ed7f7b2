"""A trained run as a folder that ``transformers`` loads: weights, configuration, and the vocabulary."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from sophia.lab.config.run import Run
from sophia.lab.data import vocabulary
from sophia.lab.models import build
from sophia.lab.support.dataclass_json import from_json
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import read_json
from sophia.lab.training import checkpoint

__all__ = ["export", "tokenizer", "trained"]


def trained(folder: Path) -> tuple[nn.Module, Run]:
    """The model of a run that was trained with its weights kept, in evaluation mode, and what the run is.

    Raises ``UsageError`` for a run that has not ended, or whose last weights were not kept.
    """
    config = from_json(Run, read_json(folder / "config.json"))
    state = checkpoint.load(folder)
    if state is None or state["step"] != config.steps:
        at = "no step" if state is None else f"step {state['step']}"
        raise UsageError(
            f"{folder} has weights of {at}, and its run has {config.steps}: the trained model is not there. "
            "Train it to its end with sophia pretrain, which keeps the last weights."
        )
    model = build.build(config.model, seed=config.seed)
    weights = state.get("model")
    if weights is None:  # saved by a sharded run, in parts
        from torch.distributed.checkpoint.state_dict_loader import load

        parts = {"model": model.state_dict()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it is alone, which is meant
            load(parts, checkpoint_id=folder / state["shards"], no_dist=True)
        weights = parts["model"]
    model.load_state_dict(weights)
    return model.eval(), config


def export(folder: Path, out: Path) -> Path:
    """Write the trained model of a run so that ``AutoModelForCausalLM.from_pretrained(out)`` gives it back,
    and with it, if the run used the shipped vocabulary, what ``AutoTokenizer`` needs.
    """
    model, config = trained(folder)
    model.save_pretrained(out)  # type: ignore[operator]
    if config.data.vocabulary == vocabulary.SHA256:
        tokenizer(config).save_pretrained(out)
    return out


def tokenizer(config: Run) -> Any:
    """The shipped vocabulary as a ``PreTrainedTokenizerFast`` of ``transformers``, for the context of a run.

    Raises ``UsageError`` for a run on tokens of another one.
    """
    if config.data.vocabulary != vocabulary.SHA256:
        raise UsageError(
            f"The run was trained on tokens of {config.data.vocabulary!r}, and the lab ships another "
            "vocabulary. Give a folder that AutoTokenizer reads: --tokenizer FOLDER"
        )
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    words = vocabulary.tokenizer()
    words.decoder = ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=config.model.context,
        bos_token=vocabulary.SEPARATOR,  # stands before each document in training
        eos_token=vocabulary.SEPARATOR,
    )
