"""docs/hosts/trl.md: a fused head without logits; pairs and a policy, whose curvature is taken by hand."""

import random

import pytest
import torch
from pages import refreshed, run, watching

trl = pytest.importorskip("trl", reason="needs trl (extra [hosts])")
datasets = pytest.importorskip("datasets", reason="needs datasets (extra [hosts])")

from tiny_texts import llama, text, tokenizer  # noqa: E402

from sophia import Sophia, SophiaWarning  # noqa: E402
from sophia.integrations.transformers import SophiaCallback  # noqa: E402
from tiny import LabelsFromLogits, estimate_in_state, oracle, relative_error  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = {
    "output_dir": "out",
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the trainers write to "out"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def texts(number):
    """Of unlike lengths, so that there is padding, or packing."""
    draw = random.Random(number)
    return datasets.Dataset.from_list([{"text": text(draw, draw.randint(5, 11))} for _ in range(number)])


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_page_of_sft(packing):
    """A model that hands out neither logits nor hidden states, in bfloat16, with checkpointed activations."""
    names, steps = run(
        "trl.md",
        "SFTTrainer",
        model=llama(),
        tokenizer=tokenizer(),
        dataset=texts(200),
        packing=packing,
        settings={**SETTINGS, "max_length": 32},
    )
    assert names["arguments"].bf16
    assert names["arguments"].gradient_checkpointing
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert all(taken.counted >= 4 * 5 for taken in steps)


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def answers(number):
    """Prompts, which do not count, and completions."""
    draw = random.Random(number)
    rows = [
        {"prompt": text(draw, 4), "completion": " " + text(draw, draw.randint(2, 7))} for _ in range(number)
    ]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("packing", "lora", "dataset"),
    [
        (False, False, texts),
        (True, False, texts),
        (True, True, texts),
        (False, True, answers),
        (True, False, answers),
    ],
)
def test_h_under_sft_is_the_oracle(packing, lora, dataset):
    """Predictions of padding or of the next document, a head left out, micro-batches weighed alike."""
    model = llama()
    if lora:
        peft = pytest.importorskip("peft", reason="needs peft (extra [dev])")
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    opt = Sophia(model, lr=0.0, weight_decay=0.0, fraction=1.0, likelihood=LabelsFromLogits())
    arguments = trl.SFTConfig(
        **{
            **SETTINGS,
            "max_steps": 1,
            "bf16": False,
            "max_length": 32,
            "packing": packing,
            "max_grad_norm": 0.1,
        }
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=dataset(96),
        processing_class=tokenizer(),
        optimizers=(opt, None),
    )
    calls = []

    def note(_, args, kwargs):
        if len(calls) < 2:  # a refresh calls it too
            calls.append({k: v.clone() if torch.is_tensor(v) else v for k, v in kwargs.items()})

    with model.register_forward_pre_hook(note, with_kwargs=True):
        trainer.train()

    def logits(model, calls):
        parts = []
        for call in calls:
            counts = call["labels"][:, 1:] != -100
            rest = {k: v for k, v in call.items() if k not in ("labels", "fused_lm_head")}
            parts.append(model(**rest).logits[:, :-1][counts])
        return torch.cat(parts)

    counted = sum(int((call["labels"][:, 1:] != -100).sum()) for call in calls)
    expected, count = oracle(model, calls, torch.ones(counted, dtype=torch.bool), logits)
    assert opt.stats()["B"] == count == counted
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
    assert set(opt.state) == set(expected) != set()


def test_adapters_that_the_trainer_puts_on():
    """Sophia built by the trainer, after it has wrapped the model."""
    peft = pytest.importorskip("peft", reason="needs peft (extra [dev])")
    trainer = trl.SFTTrainer(
        llama(),
        args=trl.SFTConfig(**{**SETTINGS, "packing": True, "max_length": 32}),
        train_dataset=texts(200),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(**LORA),
        optimizer_cls_and_kwargs=(Sophia, {"lr": 1e-4}),
    )
    SophiaCallback.add_to(trainer)
    with watching() as steps:
        trainer.train()
    assert [log["sophia/refreshes"] for log in trainer.state.log_history if "loss" in log] == [1.0]
    assert refreshed(steps) == [0, 10]
    named = dict(trainer.model.named_parameters())
    state = trainer.optimizer.optimizer.state
    assert set(state) == {p for name, p in named.items() if "lora_" in name}
    assert all(bool(s["hessian"].any()) for s in state.values())


def preferences(number):
    draw = random.Random(number)
    rows = [
        {"prompt": text(draw, 3), "chosen": " " + text(draw, 5), "rejected": " " + text(draw, 4)}
        for _ in range(number)
    ]
    return datasets.Dataset.from_list(rows)


def test_page_of_dpo():
    """Pairs that are counted as tokens, or one pass for each micro-batch."""
    _, steps = run(
        "trl.md",
        "DPOTrainer",
        model=llama(),
        ref_model=llama(seed=2),
        tokenizer=tokenizer(),
        dataset=preferences(96),
        settings=SETTINGS,
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"margin of a pair.*likelihood='bernoulli'.*hp\.sampled_loss\(margin\)"),
        ({"estimator": "hutchinson"}, r"Hutchinson's .*Fused kernels"),
    ],
    ids=["as tokens", "hutchinson"],
)
def test_dpo_without_the_pairs_is_told(settings, words):
    """Curvature of single tokens, where the loss is of pairs; a kernel that has no second backward."""
    model = llama()
    trainer = trl.DPOTrainer(
        model,
        llama(seed=2),
        args=trl.DPOConfig(**{**SETTINGS, "max_steps": 1}),
        train_dataset=preferences(8),
        processing_class=tokenizer(),
        optimizers=(Sophia(model, **settings), None),
    )
    told = pytest.raises(RuntimeError, match=words) if settings else pytest.warns(SophiaWarning, match=words)
    with told:
        trainer.train()


def test_page_of_grpo():
    """Tokens of the prompt, or of what comes after the end, that are counted as the policy's."""
    draw = random.Random(0)
    rows = datasets.Dataset.from_list([{"prompt": text(draw, 4)} for _ in range(96)])
    seen = []

    def reward(completions, **_):
        seen.append(completions)
        return [float(len(set(words.split()))) for words in completions]

    _, steps = run(
        "trl.md",
        "GRPOTrainer",
        model=llama(),
        tokenizer=tokenizer(),
        dataset=rows,
        reward=reward,
        settings={**SETTINGS, "num_generations": 2, "max_completion_length": 6},
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    # Four completions in the micro-batch, of at most six tokens.
    assert all(4 <= taken.counted <= 24 for taken in steps)
