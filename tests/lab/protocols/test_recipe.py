"""The recipes of the paper's sizes: built without numbers, counted, held to what is known of the paper."""

import dataclasses

import pytest
import torch

from sophia.lab import cli
from sophia.lab.config.run import Data, Model
from sophia.lab.models import build
from sophia.lab.models.build import parameter_count
from sophia.lab.models.size import flops_per_token, forecast, parameters
from sophia.lab.protocols import recipe
from sophia.lab.support.errors import UsageError

NAMES = ("gpt2-125m", "gpt2-355m", "gpt2-540m", "gpt2-770m", "neox-1.5b", "neox-6.6b")
NOMINAL = dict(zip(NAMES, (125e6, 355e6, 540e6, 770e6, 1.5e9, 6.6e9), strict=True))
NOWHERE = Data("openwebtext", "", "gpt2")


def run(name, contender="adamw", **changes):
    return recipe.find(name).run(contender, data=NOWHERE, seed=1, **changes)


def test_the_recipes_are_the_sizes_of_the_paper():
    """A recipe that is packaged but forgotten, or of another size than its name."""
    assert tuple(recipe.recipes()) == NAMES
    for name, size in NOMINAL.items():
        assert recipe.find(name).name == name
        assert parameters(recipe.find(name).model) == pytest.approx(size, rel=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_can_be_planned_and_keeps_what_the_paper_says(name):
    """A setting that the contender does not have, found after a day in the queue."""
    found = recipe.find(name)
    assert next(iter(found.contenders)) == "adamw"
    assert {"adamw", "sophia-g"} <= set(found.contenders)
    for contender in found.contenders:
        planned = run(name, contender, steps=found.steps // 2)
        assert planned.schedule.warmup == 2000  # the same for half the steps
        assert planned.precision == "bfloat16"
        assert planned.clip == 1.0
        if contender.startswith("sophia"):
            settings = planned.optimizer.settings
            assert (settings["beta1"], settings["beta2"], settings["update_every"]) == (0.96, 0.99, 10)
            assert settings["gamma"] == {"sophia-g": 0.05, "sophia-h": 0.01}[contender]


def test_flops_are_those_of_the_papers_table_as_recalled():
    """A formula that is off would make wrong prices; these four numbers were written down before it."""
    for name, contender, tera in (
        ("gpt2-355m", "adamw", 1195), ("gpt2-355m", "sophia-g", 1255),
        ("gpt2-770m", "adamw", 2550), ("gpt2-770m", "sophia-g", 2678),
    ):  # fmt: skip
        assert forecast(run(name, contender)).flops_per_step == pytest.approx(tera * 1e12, rel=0.005)


def test_flops_are_those_that_torch_counts():
    """A forecast against the operations of a real forward and backward, attention among them."""
    from torch.utils.flop_counter import FlopCounterMode

    small = Model(layers=3, width=64, heads=4, context=128, vocabulary=512)
    model = build.build(small, seed=1)
    model.set_attn_implementation("eager")
    ids = torch.randint(512, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    position = 128 * 64  # an addition, no product
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    exact = flops_per_token(small, parameter_count(model) - position - vectors) * ids.numel()
    assert counter.get_total_flops() == pytest.approx(exact, rel=1e-6)


def test_memory_is_divided_where_it_is_shared():
    """A forecast that says a model fits where it does not."""
    whole, shared = (
        forecast(run("neox-6.6b", "sophia-g", micro_batches=64), devices=8, sharded=s) for s in (False, True)
    )
    assert whole.weights == 16 * whole.parameters
    assert shared.weights == whole.weights // 8
    assert shared.refresh == whole.refresh // 8 == whole.parameters * 4 // 8
    assert whole.activations == shared.activations
    rows = 2048 // 8 // 64
    logits = rows * 1024 * 50432 * 10
    assert whole.activations == rows * 1024 * 34 * 4096 * 32 + logits
    assert forecast(run("neox-6.6b", micro_batches=64), devices=8).refresh == 0
    less = forecast(run("neox-6.6b", micro_batches=64), devices=8, recompute=True)
    assert (less.activations - logits) * 17 == whole.activations - logits


def test_the_meta_device_leaves_no_numbers_and_a_neox_is_one():
    """6.6 billion numbers drawn to be counted; or a GPT-2 called NeoX."""
    with torch.device("meta"):
        built = build.build(recipe.find("neox-6.6b").model, seed=1)
    assert all(p.is_meta for p in built.parameters())
    assert type(built).__name__ == "GPTNeoXForCausalLM"
    tiny = Model(kind="neox", layers=1, width=16, heads=2, context=8, vocabulary=32)
    ids = torch.randint(32, (2, 8))
    loss = build.build(tiny, seed=1)(input_ids=ids, labels=ids).loss
    loss.backward()
    assert abs(float(loss.detach()) - 3.47) < 0.3  # log 32, untrained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('recalled = ["lion.speed"]', "'lion.speed' is marked, but there is no such value"),
        ('recalled = ["model.hight"]', "'model.hight' is marked"),
        ("[contenders.adamx]", "There is no contender 'adamx'"),
        ("[contenders.lion]\nrate = 1", "lion has no setting 'rate'"),
        ("batch = ", "cannot be read as a recipe"),
        ("colour = 1", "has no field 'colour'"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_its_name(tmp_path, change, message):
    """A misspelt word ignored, and a month of computing with another setting."""
    path = tmp_path / "mine.toml"
    text = recipe.recipes()["gpt2-355m"].read_text()
    lines = text.splitlines()
    if change.startswith("recalled"):
        lines = [change if line.startswith("recalled") else line for line in lines]
    elif change.startswith("[contenders.lion]"):
        lines = lines[: lines.index("[contenders.lion]")] + change.splitlines()
    elif change.startswith("["):
        lines += [change]
    else:
        lines = [change, *lines]
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=r"mine\.toml") as error:
        recipe.find(str(path))
    assert message in str(error.value)


def test_what_there_is_not_is_said():
    """A default of a smaller scale, taken for the paper's."""
    with pytest.raises(UsageError, match="no settings for 'muon'"):
        run("gpt2-125m", "muon")
    with pytest.raises(UsageError, match="There is no recipe 'gpt2-1b'"):
        recipe.find("gpt2-1b")
    with pytest.raises(UsageError, match="kind is 'gpt5': write"):
        Model(kind="gpt5")
    with pytest.raises(UsageError, match="a neox has no such scaling"):
        Model(kind="neox", scale_attention_by_layer=True)
    with pytest.raises(UsageError, match="precision is 'half'"):
        dataclasses.replace(run("gpt2-125m"), precision="half")


def test_the_forecast_is_printed(capsys):
    """A command that needs data, or a GPU, to say that there is not enough memory."""
    cli.main(["pretrain", "gpt2-125m", "gpt2-355m", "--forecast", "--devices", "8", "--layout", "fsdp2"])
    said = capsys.readouterr().out
    assert "gpt2-125m" in said
    assert "1,255" in said
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "gpt2-125m"])
    assert "no tokens" in capsys.readouterr().err
