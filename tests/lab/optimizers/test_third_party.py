"""Optimizers of other people, by dotted path and by entry point."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import sophia
from sophia.lab.config.run import Data, Model, Optimizer
from sophia.lab.config.search_space import Choice, LogRange
from sophia.lab.data import vocabulary
from sophia.lab.models.build import gpt2
from sophia.lab.optimizers import table, third_party
from sophia.lab.protocols import protocol_file
from sophia.lab.protocols.protocol import split_label
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.support.import_by_path import load_class
from sophia.lab.training.fingerprint import fingerprint
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import rows

PAGE = (Path(__file__).parents[3] / "docs" / "third-party.md").read_text()
SMALL = Model(layers=1, width=16, heads=2, context=8)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The example of the docs in a package on the path, offered as "calm" by a distribution."""
    folder = tmp_path / "site"
    (folder / "mypackage_of_docs").mkdir(parents=True)
    (folder / "mypackage_of_docs" / "__init__.py").touch()
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert len(code.splitlines()) <= 25  # what the page promises
    (folder / "mypackage_of_docs" / "optimizers.py").write_text(code)
    info = folder / "calm_of_docs-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: calm-of-docs\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[sophia.contenders]\ncalm = mypackage_of_docs.optimizers:Calm\n")
    monkeypatch.syspath_prepend(folder)
    for name in ("mypackage_of_docs", "mypackage_of_docs.optimizers"):  # another test's, in another folder
        monkeypatch.delitem(sys.modules, name, raising=False)
    return folder


def test_the_example_of_the_docs_runs_by_path_and_by_entry_point(package, text_file, tmp_path, cache):
    """Else the page would promise what does not work. In a process of its own, somewhere else, as a user's:
    the workers have to find the class too, and nothing that this process has imported helps.
    """
    path = "loose_of_docs.optimizers:Calm"
    out, elsewhere = tmp_path / "c", tmp_path / "elsewhere"
    shutil.copytree(package / "mypackage_of_docs", elsewhere / "loose_of_docs")  # in the working folder alone
    (package / "calm_of_docs-1.2.dist-info" / "top_level.txt").write_text("mypackage_of_docs\n")
    options = ["--preset", "tiny", "--seeds", "1", "--budgets", "8", "--workers", "1"]
    options += ["--set", "mine.beta=0.8", "--data", str(text_file), "--out", str(out)]
    source = str(Path(sophia.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "sophia.lab.cli", "compare", "calm", f"mine={path}", *options],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{package}", "SOPHIA_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "calm: loss" in done.stdout
    assert "mine: loss" in done.stdout
    content = json.loads((out / "comparison.json").read_text())
    assert content["contenders"] == ["adamw", "calm", "mine"]
    for run in content["runs"]:
        assert json.loads((out / "runs" / run["run"] / "result.json").read_text())["status"] == "finished"
    assert content["settings"]["calm"]["code"] == "calm-of-docs 1.2", "an installed package by its version"
    mine = content["settings"]["mine"]
    assert mine["beta"] == 0.8
    assert mine["class"] == path
    assert mine["code"].startswith("sha256:")
    protocol = json.loads((out / "protocol.json").read_text())["protocol"]
    assert protocol["contenders"]["mine"]["optimizer"] == path


def test_changed_code_is_another_optimizer(package):
    """Else half a comparison would be of the code before an edit."""
    row = table.find("mine", "mypackage_of_docs.optimizers:Calm")
    assert table.of(Optimizer("mine", row.settings({}))).settings({}) == row.settings({})
    file = package / "mypackage_of_docs" / "optimizers.py"
    file.write_text(file.read_text() + "# edited\n")
    with pytest.raises(LabError, match=r"planned with the code sha256:.*Restore that code"):
        table.of(Optimizer("mine", row.settings({})))


def test_what_is_installed_is_known_by_its_version():
    """Else a hash of one file would stand for a whole distribution."""
    installed = f"torch {importlib.metadata.version('torch')}"  # torch.__version__ may name a build besides
    assert third_party.contender("r", "torch.optim:RAdam").defaults["code"] == installed


def made(monkeypatch, **classes):
    module = types.ModuleType("made_by_test")
    vars(module).update(classes)
    monkeypatch.setitem(sys.modules, "made_by_test", module)
    return "made_by_test:"


def test_a_class_of_torch_works_as_it_is():
    """Else everybody would have to write a wrapper first."""
    row = third_party.contender("radam", "torch.optim:RAdam")
    assert row.defaults["beta2"] == 0.999
    assert row.space == {"lr": LogRange(1e-4, 1e-2)}
    optimizer = row.build(gpt2(SMALL, seed=1), row.settings({"beta1": 0.8, "weight_decay": 0.3}), 1)
    assert [(g["betas"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ((0.8, 0.999), 0.3),
        ((0.8, 0.999), 0.0),
    ]


def test_a_class_that_takes_the_model_gets_it(monkeypatch):
    """Else an optimizer with hooks on the model, as Sophia is, could not be compared."""
    seen = []

    class Whole(torch.optim.SGD):
        sophia_gradients = 0.5

        def __init__(self, model, lr, seed):
            seen.append((model, seed))
            super().__init__(model.parameters(), lr=lr)

    Whole.sophia_defaults = {"lr": 0.1}
    Whole.sophia_space = {"lr": {"low": 0.01, "high": 1}, "warmup": [0.1, 0.2]}
    row = third_party.contender("whole", made(monkeypatch, Whole=Whole) + "Whole")
    model = gpt2(SMALL, seed=1)
    row.build(model, row.settings({}), 7)
    assert seen == [(model, 7)]
    assert row.gradients(row.settings({})) == 0.5
    assert row.space == {"lr": LogRange(0.01, 1.0), "warmup": Choice((0.1, 0.2))}


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware descent: the gradient is taken again at the top of the hill. arXiv 2010.01412."""

    sophia_defaults = {"lr": 0.05, "rho": 0.05}  # noqa: RUF012
    sophia_gradients = 1.0
    sophia_closure = True
    seen: list[float] = []  # noqa: RUF012

    def __init__(self, params, lr, rho):
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure):
        mine = [(p, g["lr"], g["rho"]) for g in self.param_groups for p in g["params"]]
        first = [p.grad.clone() for p, _, _ in mine]
        norm = torch.stack([g.norm() for g in first]).norm()
        for (p, _, rho), g in zip(mine, first, strict=True):
            p.add_(g, alpha=rho / float(norm))
        loss = closure()
        self.seen.append(float(loss))
        for (p, lr, rho), g in zip(mine, first, strict=True):
            p.sub_(g, alpha=rho / float(norm)).sub_(p.grad, alpha=lr)
        return loss


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_optimizer_with_passes_of_its_own_gets_a_closure(monkeypatch, text, ids, tmp_path, micro_batches):
    """Else whatever needs the loss or the gradient at other weights could not be compared."""
    path = made(monkeypatch, Sharp=Sharp) + "Sharp"
    fingerprint(third_party.contender("sharp", path))  # its steps are none of the run's: made before them
    Sharp.seen.clear()
    protocol = protocol_file.chosen("tiny", None).with_contenders([f"sharp={path}"])
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    config = protocol.run("sharp", data=data, seed=1, steps=20)
    config = dataclasses.replace(config, log_every=1, micro_batches=micro_batches)
    result = train(config, tmp_path, ids)
    assert result["gradient_evaluations"] == 40
    losses = [r["loss"] for r in rows(tmp_path / config.hash) if r["kind"] == "train"]
    assert len(Sharp.seen) == len(losses) == 20
    assert all(up > down for up, down in zip(Sharp.seen, losses, strict=True)), "it looked up the hill"
    assert losses[-1] < losses[0] - 0.1
    start = [r["loss"] for r in rows(tmp_path / config.hash) if r["kind"] == "eval"]
    assert result["loss"] == start[-1] < start[0]


class NoRate(torch.optim.Optimizer):
    def __init__(self, params, lr=None):
        super().__init__(params, {})


def said(base=torch.optim.SGD, **attributes):
    return type("Bad", (base,), {f"sophia_{name}": value for name, value in attributes.items()})


BAD = {
    "no lr": (NoRate, UsageError, "says no learning rate"),
    "groups without lr": (said(NoRate, defaults={"lr": 0.1}), LabError, "groups without lr"),
    "wrong settings": (said(defaults={"lr": 0.1, "gama": 1}), LabError, "could not be built"),
    "not plain": (said(defaults={"lr": 0.1, "betas": (0.9, 0.9)}), UsageError, "Write plain values"),
    "space of no setting": (said(space={"gama": [1, 2]}), UsageError, "no setting of the class"),
    "space of nothing": (said(space={"lr": []}), UsageError, "cannot draw from"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_what_a_class_lacks_is_said(make, error, message, monkeypatch):
    """Else somebody's first try would end in a traceback inside the lab."""
    with pytest.raises(error, match=message):
        row = third_party.contender("bad", made(monkeypatch, Bad=make) + "Bad")
        row.build(gpt2(SMALL, seed=1), row.settings({}), 1)


def test_a_label_is_checked_and_a_known_name_is_not_taken():
    """Else a contender could write outside its folder, or pass for AdamW."""
    with pytest.raises(UsageError, match=r"my-adamw=x:Y"):
        table.find("adamw", "x:Y")
    assert split_label("../x=a.b:C") == ("../x", "a.b:C")  # refused by the protocol
    assert split_label("a.b:MyOptimizer") == ("myoptimizer", "a.b:MyOptimizer")


def test_the_working_folder_is_searched_last(tmp_path, monkeypatch):
    """Else a file beside the user could hide an installed package, or their own could not be found."""
    monkeypatch.syspath_prepend(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only_here_for_a_test.py").write_text("class Mine: pass\n")
    assert load_class("only_here_for_a_test:Mine").__name__ == "Mine"
    assert sys.path[-1] == str(tmp_path)
