"""Few-shot accuracy of a trained model, by lm-evaluation-harness.

The harness is the optional extra ``eval``, and its numbers are its own: the same prompts, the same scoring as
everybody's. A task is one that it ships, whose data come from a hub, or a YAML file in a folder of yours
(``write_task`` makes one from pairs of endings). Examples are drawn by a seed; the paper's figures, as
recalled, are means over five draws of two examples.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sophia.lab.support.errors import UsageError

__all__ = ["Item", "Score", "evaluate", "require", "write_task"]

MODULE, EXTRA = "lm_eval", "pip install -c constraints/dev.txt -c constraints/eval.txt 'torch-sophia[eval]'"


@dataclass(frozen=True)
class Item:
    """The beginning of a text and its endings, one of which is right."""

    context: str
    choices: tuple[str, ...]
    answer: int
    """Place of the right one."""


@dataclass(frozen=True)
class Score:
    """A model on a task with one draw of examples."""

    task: str
    shots: int
    draw: int
    """The seed of the examples."""
    accuracy: float
    """Share of the items whose right ending is the likeliest."""
    items: int


def require(what: str) -> None:
    """Raise ``UsageError`` where the harness is not installed."""
    if importlib.util.find_spec(MODULE) is None:
        raise UsageError(
            f"{what} needs lm-evaluation-harness, and there is no module {MODULE!r}. Write: {EXTRA}"
        )


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    shots: int = 2,
    draws: Sequence[int] = (1, 2, 3, 4, 5),
    folder: Path | None = None,
    download: bool = False,
    limit: int | None = None,
    batch: int = 32,
) -> list[Score]:
    """Accuracy of a causal model of ``transformers`` on each task for each draw of the examples.

    With a ``folder`` the tasks are the YAML files in it and no others; without one, the harness's own. Unless
    ``download`` is true nothing is fetched: data that are not on the disk are an error of the harness.
    ``limit`` takes the first so many items of a task. Raises ``UsageError`` without the harness, and for a
    task that is not there.
    """
    require("A few-shot evaluation")
    with _manners(download):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=None if folder is None else str(folder), include_defaults=folder is None
        )
        known = set(manager.all_tasks)
        if missing := [task for task in tasks if task not in known]:
            where = "lm-evaluation-harness" if folder is None else str(folder)
            raise UsageError(f"There is no task {missing[0]!r} in {where}. Give the name that its YAML says.")
        device = str(next(model.parameters()).device)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=device)
        # It would ask a hub for the commit of the weights, which are on no hub.
        lm.get_model_info = dict
        scores = []
        for draw in draws:
            found = simple_evaluate(
                lm,
                tasks=list(tasks),
                num_fewshot=shots,
                fewshot_random_seed=draw,
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
            assert found is not None
            for task, metrics in found["results"].items():
                number = found["n-samples"][task]["effective"]
                scores.append(Score(task, shots, draw, float(metrics["acc,none"]), int(number)))
    return scores


def write_task(folder: Path, name: str, *, examples: Sequence[Item], items: Sequence[Item]) -> Path:
    """Write a task of multiple choice for the harness, data and all; return its YAML file.

    ``examples`` are those that prompts are made of, ``items`` what is scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", examples), ("validation", items)):
        lines = [
            json.dumps({"context": i.context, "choices": list(i.choices), "answer": i.answer}) for i in rows
        ]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    files = {split: str((folder / f"{split}.jsonl").resolve()) for split in ("train", "validation")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str((folder / "cache").resolve())},
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "fewshot_split": "train",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
        "fewshot_delimiter": "\n",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return path


@contextlib.contextmanager
def _manners(download: bool) -> Iterator[None]:
    """The harness's log and its bars, silenced (what fails, raises); the hub, switched off."""
    names = () if download else ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    logger = logging.getLogger(MODULE)
    level = logger.level
    os.environ.update(dict.fromkeys(before, "1"))
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
