"""Hosts that build ``cls(model.parameters(), **settings)``: under their wrappers the module is found that
``Sophia(model)`` records.
"""

import logging

import pytest
import torch
from pages import refreshed, watching
from tiny_hosts import COUNTED, gpt2, pairs, rows
from torch import nn

from sophia import Sophia
from tiny import GPT, Bare, T, data

lightning = pytest.importorskip("lightning", reason="needs lightning (extra [dev])")
from lightning.fabric import Fabric  # noqa: E402

pytestmark = [
    # What Lightning says about small machines, short runs and torch itself.
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed as a dependency"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark.append(
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
)
SETTINGS = {"lr": 1e-3, "update_every": 2}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trainers write logs and checkpoints


def h_of(opt):
    return torch.cat([opt.state[p]["hessian"].flatten() for p in opt._trained()])


# ---- Lightning ----


class Language(lightning.LightningModule):
    """As a configuration builds it: ``self.parameters()`` is all that its optimizer sees."""

    def __init__(self, model, make):
        super().__init__()
        self.model, self.make = model, make
        self.teacher = nn.Linear(3, 3).requires_grad_(False)

    def training_step(self, batch, number):
        return self.model(*batch)[1]

    def configure_optimizers(self):
        return self.make(self)


class Itself(Language):
    """A module that calls itself, as Lightning's first example does."""

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())


def fit(module, strategy):
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with watching() as steps:
        trainer.fit(module, pairs(96, batch_size=4))
    return module.optimizers().optimizer, steps


@pytest.fixture
def no_group_left():
    """Lightning's strategy leaves its process group behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
@pytest.mark.parametrize("kind", [Language, Itself])
def test_lightning(kind, strategy):
    """DDP leads ``training_step`` through the module's forward: its loss is not what is recorded."""
    made = Bare if kind is Itself else GPT
    found, steps = fit(kind(made(), lambda module: Sophia(module.parameters(), **SETTINGS)), strategy)
    assert refreshed(steps) == [0, 2]
    assert {taken.counted for taken in steps} == {4 * T / 4}  # a row of four
    given, _ = fit(kind(made(), lambda m: Sophia(m.parameters(), model=m.model, **SETTINGS)), strategy)
    assert torch.equal(h_of(found), h_of(given))
    assert type(found._model) is (Itself if kind is Itself else GPT)


@pytest.mark.parametrize("first", ["Sophia", "setup"])
def test_fabric(first):
    """Its wrapper's own outputs accept no backward but Fabric's."""
    fabric = Fabric(accelerator="cpu", devices=1)
    inner = GPT()
    if first == "Sophia":
        model, opt = fabric.setup(inner, Sophia(inner.parameters(), **SETTINGS))
    else:
        model = fabric.setup_module(inner)
        opt = fabric.setup_optimizers(Sophia(model.parameters(), **SETTINGS))
    x, y = data(8)
    fabric.backward(model(x, y)[1])
    opt.step()
    assert opt.optimizer._model is inner
    assert opt.optimizer.stats()["B"] == T


class Stepping(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, x, y):
        return self.model(x, y)[1]


def test_fabric_with_a_method():
    """A method that Fabric leads through the module's forward is not the forward that is recorded."""
    fabric = Fabric(accelerator="cpu", devices=1)
    module = Stepping(GPT())
    model, opt = fabric.setup(module, Sophia(module.parameters(), **SETTINGS))
    fabric.backward(model.training_step(*data(8)))
    opt.step()
    assert opt.optimizer._model is module.model


# ---- transformers, PEFT ----


def batch():
    ids = torch.stack([row["input_ids"] for row in rows(8)])
    return {"input_ids": ids, "labels": ids}


def test_trainer_with_a_class(tmp_path):
    """The Trainer's own groups, of parameters alone."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra [dev])")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    chosen = (Sophia, dict(SETTINGS))
    trainer = transformers.Trainer(gpt2(), arguments, train_dataset=rows(32), optimizer_cls_and_kwargs=chosen)
    with watching() as steps:
        trainer.train()
    assert refreshed(steps) == [0, 2]
    assert {taken.counted for taken in steps} == {COUNTED}
    opt = trainer.optimizer.optimizer
    assert opt._model is trainer.model
    assert [group["weight_decay"] for group in opt.param_groups][-1] == 0.0


@pytest.mark.parametrize("which", ["trained alone", "all"])
def test_peft(which):
    """The adapters of inner layers lie in parts of the model that are not what is called."""
    peft = pytest.importorskip("peft", reason="needs peft (extra [dev])")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), settings).train()
    given = [p for p in model.parameters() if p.requires_grad or which == "all"]
    hs, groups = [], []
    for named in (None, model):
        opt = Sophia(given, model=named, lr=0.0, rule="damped")
        model(**batch()).loss.backward()
        opt.step()
        opt.zero_grad()
        assert opt._model is model
        hs.append([opt.state[p]["hessian"] for p in given if p.requires_grad])
        groups.append([(g["rule"], g["scale"], [id(p) for p in g["params"]]) for g in opt.param_groups])
    assert all(map(torch.equal, *hs))
    assert groups[0] == groups[1]
