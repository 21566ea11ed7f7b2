"""docs/hosts/transformers.md: the Trainer, three ways; what it logs; that it resumes bit for bit."""

from contextlib import nullcontext

import pytest
import torch
from pages import refreshed, run, watching

transformers = pytest.importorskip("transformers", reason="needs the extra [lab]")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate (extra [dev])")

from tiny_hosts import COUNTED, gpt2, rows  # noqa: E402

from sophia import Sophia, SophiaWarning  # noqa: E402
from sophia.integrations.transformers import SophiaCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
HALF = 4 * COUNTED  # one of the two micro-batches of four rows


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the examples write to "out"


def arguments(**settings):
    return transformers.TrainingArguments(
        **{
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 12,
            "logging_steps": 4,
            "disable_tqdm": True,
            "save_strategy": "no",
            "output_dir": "out",
            **settings,
        }
    )


WAYS = [
    ("transformers.md", "optimizers="),
    ("transformers.md", "optimizer_cls_and_kwargs="),
    ("transformers.md", "A subclass"),
]


@pytest.mark.parametrize(("page", "title"), WAYS, ids=[title for _, title in WAYS])
def test_page(page, title):
    """H renewed once a micro-batch, never, or by the Trainer's own count of steps."""
    names, steps = run(page, title, model=gpt2(), dataset=rows(96))
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {HALF}
    assert steps[0].lr != steps[-1].lr  # the Trainer's schedule
    groups = names["trainer"].optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [
        {"optimizers=": 0.1, "A subclass": 0.0}.get(title, 0.2),
        0.0,
    ]


VARIANTS = {
    "one micro-batch": ({"gradient_accumulation_steps": 1}, COUNTED),
    "bf16": ({"bf16": True, "use_cpu": True}, HALF),
    "label smoothing": ({"label_smoothing_factor": 0.1}, HALF),
    "bf16 and label smoothing": ({"bf16": True, "use_cpu": True, "label_smoothing_factor": 0.1}, HALF),
    "activation checkpointing": ({"activation_checkpointing": True}, HALF),
    "clipped to nothing": ({"max_grad_norm": 1e-4}, HALF),
    "an evaluation in between": ({"eval_strategy": "steps", "eval_steps": 3}, HALF),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_trainer_does_around_the_step(variant):
    """Accumulation, casts, losses outside of the model and evaluations that would be counted or missed."""
    settings, counted = VARIANTS[variant]
    model = gpt2()
    trainer = transformers.Trainer(
        model,
        arguments(**settings),
        train_dataset=rows(96),
        eval_dataset=rows(4),
        optimizers=(Sophia(model, lr=1e-3), None),
    )
    # A norm of 1e-4 is far below the usual one of 2: m is that much smaller, and that is said.
    heard = pytest.warns(SophiaWarning, match="gamma acts as") if "nothing" in variant else nullcontext()
    with watching() as steps, heard:
        trainer.train()
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {counted}


class Reporter(transformers.TrainerCallback):
    """Stands for W&B: a callback of the Trainer's own that sends what it is given."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append(dict(logs))


@pytest.mark.parametrize("first", [True, False])
def test_callback_logs_the_numbers(first):
    """A curve of the unclipped share that stays empty, in the trackers or in the file."""
    model, reporter = gpt2(), Reporter()
    callbacks = [reporter] if first else [SophiaCallback(), reporter]
    trainer = transformers.Trainer(
        model,
        arguments(eval_strategy="steps", eval_steps=6),
        train_dataset=rows(96),
        eval_dataset=rows(4),
        callbacks=callbacks,
        optimizers=(Sophia(model), None),
    )
    if first:
        SophiaCallback.add_to(trainer)
    trainer.train()
    for records in (reporter.sent, trainer.state.log_history):
        logged = [record for record in records if "sophia/age" in record]
        assert [record["sophia/age"] for record in logged] == [4.0, 8.0, 2.0]
        assert [record["sophia/refreshes"] for record in logged] == [1.0, 1.0, 2.0]
        assert all("loss" in record and record["sophia/B"] == HALF for record in logged)
        assert any("eval_loss" in record for record in records)


def test_callback_with_another_optimizer_is_refused():
    """An empty log for a run that was thought to be Sophia's."""
    trainer = transformers.Trainer(gpt2(), arguments(), train_dataset=rows(96), callbacks=[SophiaCallback()])
    with pytest.raises(TypeError, match=r"the optimizer of this Trainer is AdamW.*: pass optimizers="):
        trainer.train()


def test_resume_is_bit_equal(tmp_path):
    """12 = 7 + 5, stopped in the middle of an interval: weights and h."""
    results = []
    for stop in (12, 7):
        model = gpt2()
        opt = Sophia(model, lr=1e-3, update_every=5)
        settings = arguments(save_strategy="steps", save_steps=7, output_dir=str(tmp_path / str(stop)))
        trainer = transformers.Trainer(model, settings, train_dataset=rows(96), optimizers=(opt, None))
        if stop == 12:
            trainer.train()
        else:
            # As if killed after its checkpoint: the second Trainer starts from the first weights.
            checkpoint = tmp_path / "12" / "checkpoint-7"
            with watching() as steps:
                trainer.train(resume_from_checkpoint=str(checkpoint))
            assert [taken.step for taken in steps] == list(range(7, 12))
            assert refreshed(steps) == [10]
        results.append([t for p in model.parameters() for t in (p.detach(), *opt.state[p].values())])
    assert all(torch.equal(whole, resumed) for whole, resumed in zip(*results, strict=True))
