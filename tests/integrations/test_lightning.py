"""docs/hosts/lightning.md: the Trainer and Fabric; h against an oracle under both."""

import logging

import pytest
import torch
from pages import refreshed, run, watching
from tiny_hosts import pairs

lightning = pytest.importorskip("lightning", reason="needs lightning (extra [dev])")
from lightning.fabric import Fabric  # noqa: E402

from sophia import Sophia  # noqa: E402
from tiny import (  # noqa: E402
    GPT,
    LabelsFromLogits,
    T,
    data,
    estimate_in_state,
    oracle,
    relative_error,
    weights_in_means,
)

pytestmark = [
    # What Lightning says about small machines, short runs and torch itself.
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed as a dependency"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer writes logs and checkpoints


def test_page_of_the_trainer():
    """A closure, with zero_grad between forward and backward: the batch lost, or counted twice."""
    names, steps = run("lightning.md", "Trainer", model=GPT(), loader=pairs(96, batch_size=4))
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}
    assert steps[0].lr < steps[-1].lr == 6e-4
    assert names["trainer"].global_step == 12


def test_page_of_fabric():
    """Fabric's outputs accept its own backward alone, and its optimizer is a wrapper."""
    names, steps = run("lightning.md", "Fabric", model=GPT(), loader=pairs(96, batch_size=4))
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}
    assert names["opt"].optimizer.stats()["age"] == 2


class Language(lightning.LightningModule):
    """The page's module, with Sophia on another module or with settings of the test's."""

    def __init__(self, model, make):
        super().__init__()
        self.model, self.make = model, make

    def training_step(self, batch, number):
        return self.model(*batch)[1]

    def configure_optimizers(self):
        return self.make(self)


def fit(module, batches, **settings):
    lightning.Trainer(
        accelerator="cpu",
        **{
            "max_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        },
    ).fit(module, batches)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 2e-2)])
def test_h_under_the_trainer_is_the_oracle(precision, tolerance):
    """Clipping, casting and dividing the loss, none of which may reach h."""
    model, (x, y) = GPT(), data(padded=True)
    # The trainer divides the mean of each micro-batch by their number.
    weights = weights_in_means(y >= 0, 4)[y >= 0].float() / 4
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "32-true"):
        expected, count = oracle(model, x, y >= 0, weights=weights)
    settings = {"lr": 0.0, "weight_decay": 0.0, "fraction": 1.0, "likelihood": LabelsFromLogits()}
    module = Language(model, lambda module: Sophia(module.model, **settings))
    batches = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=4)
    fit(module, batches, accumulate_grad_batches=4, gradient_clip_val=1e-3, precision=precision)
    opt = module.optimizers().optimizer
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < tolerance


def test_the_lightning_module_itself_is_refused():
    """``Sophia(self)`` looks right, but Lightning calls ``training_step``, not the module."""
    module = Language(GPT(), Sophia)
    with pytest.raises(RuntimeError, match=r"Language ran no forward .*not a LightningModule"):
        fit(module, pairs(8, batch_size=4))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("first", ["Sophia", "setup"])
def test_h_under_fabric_is_the_oracle(first, compiled):
    """Sophia before or after Fabric's wrapper, which Fabric also puts inside a compiled module."""
    torch._dynamo.reset()
    fabric = Fabric(accelerator="cpu", devices=1)
    inner, (x, y) = GPT(layers=1), data(padded=True)
    # The loop sums the means of its micro-batches. Compiled without a graph, the loss is still seen.
    expected, count = oracle(inner, x, y >= 0, weights=weights_in_means(y >= 0, 4)[y >= 0].float())
    settings = {"lr": 0.0, "weight_decay": 0.0, "fraction": 1.0, "likelihood": LabelsFromLogits()}
    model = torch.compile(inner, backend="eager") if compiled else inner
    if first == "Sophia":
        model, opt = fabric.setup(model, Sophia(inner, **settings))
    else:
        model = fabric.setup_module(model)
        opt = fabric.setup_optimizers(Sophia(model, **settings))
    for xs, ys in zip(x.split(4), y.split(4), strict=True):
        fabric.backward(model(xs, ys)[1])
    with watching() as steps:
        opt.step()
    assert refreshed(steps) == [0]
    assert opt.optimizer.stats()["B"] == count
    assert relative_error(estimate_in_state(opt.optimizer), expected) < 1e-5
