"""`sophia doctor`: what is wrong is found, said with what to write, and makes the command fail."""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sophia
from sophia import Sophia
from sophia.doctor import installation as installation_module
from sophia.doctor.command import main
from sophia.doctor.findings import Finding, as_text
from sophia.doctor.given_model import Subject, example
from sophia.doctor.installation import check_installation
from sophia.doctor.machine import check_machine
from sophia.doctor.trial_steps import check_training
from sophia.step.kernels import foreach, fused_cpu

SOURCE = Path(sophia.__file__).parents[1]


def texts(findings, status):
    return " | ".join(f.text for f in findings if f.status == status)


def of(findings, topic):
    return [f for f in findings if f.topic == topic]


# ---- the whole command


def test_small_model_of_its_own(capsys):
    """The command that a user with a doubt types first."""
    code = main(["--json"])
    document = json.loads(capsys.readouterr().out)
    wrong = [f for f in document["findings"] if f["status"] == "wrong"]
    assert (code, document["wrong"], wrong) == (0, 0, [])
    assert document["sophia"] == sophia.__version__
    assert {f["topic"] for f in document["findings"]} == {
        "versions", "name", "device", "threads", "paths of the step", "model", "outputs", "loss", "rows",
        "repetition", "gradient", "training",
    }  # fmt: skip
    refreshes = next(f["data"] for f in document["findings"] if "refreshed" in f["data"])
    assert refreshes["refreshed"] == refreshes["expected"] == [0, 10]
    assert refreshes["B"] == 16.0
    losses = next(f["data"]["losses"] for f in document["findings"] if "losses" in f["data"])
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    cost = next(f["data"] for f in document["findings"] if "step_over_adamw" in f["data"])
    assert 0 < cost["step_over_adamw"] < cost["refresh_step_over_adamw"]


def test_text_is_plain_and_ends_with_the_verdict(capsys):
    """Pasted into an issue, it must be readable."""
    assert main(["--steps", "8"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() or "/" in out
    assert out.rstrip().endswith("Nothing is wrong.")
    assert (
        "  ok     output['logits'] of shape (8, 16, 32): 128 of 128 predictions count, by the gradient" in out
    )
    assert "\x1b" not in out
    assert as_text([Finding("a", "wrong", "x")] * 2).endswith("2 things are wrong.")


def run_command(*arguments, block=()):
    """The command in a new process, with modules that cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(block)!r})); "
        f"from sophia.lab.cli import main; main({list(arguments)!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )


LAB = ("numpy", "scipy", "transformers", "tyro", "rich", "matplotlib", "tokenizers", "jinja2", "pandas")


def test_torch_alone_is_enough():
    """The doctor of the lab who needs the lab to be well."""
    done = run_command("doctor", "--steps", "6", block=LAB)
    assert "Nothing is wrong." in done.stdout, done.stderr
    assert done.returncode == 0


def test_python_m_sophia():
    """Environments whose scripts are not on the path."""
    command = [sys.executable, "-m", "sophia", "doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE)})
    assert done.returncode == 0
    assert "--model module:function" in done.stdout


# ---- the installation


@pytest.mark.parametrize("name", ["Sophia-Optimizer", "sophia"])
def test_a_namesake_is_wrong(name):
    """Two distributions in one folder: which class is imported depends on who came last."""
    findings = check_installation(providers={"sophia": [name, "torch_sophia"]})
    assert f"pip uninstall {name} && pip install --force-reinstall --no-deps torch-sophia" in texts(
        findings, "wrong"
    )


def test_its_own_name_is_not():
    """A false alarm on every sound installation."""
    assert not texts(of(check_installation(providers={"sophia": ["torch-sophia"]}), "name"), "wrong")
    assert not texts(of(check_installation(providers={}), "name"), "wrong")


def test_a_namesake_in_the_environment_makes_the_command_fail(tmp_path):
    """What the metadata of a real environment looks like."""
    folder = tmp_path / "sophia_optimizer-0.2.5.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: Sophia-Optimizer\nVersion: 0.2.5\n")
    (folder / "top_level.txt").write_text("sophia\n")
    code = "from sophia.doctor.command import main; raise SystemExit(main(['--steps', '6']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{SOURCE}:{tmp_path}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1, done.stderr
    assert "WRONG  Sophia-Optimizer also installs an import package called sophia" in done.stdout
    assert done.stdout.rstrip().endswith("1 thing is wrong.")


def recorded(path, content):
    digest = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return SimpleNamespace(
        parts=("sophia", path.name),
        suffix=path.suffix,
        hash=SimpleNamespace(mode="sha256", value=digest),
        locate=lambda: path,
        __str__=lambda: f"sophia/{path.name}",
    )


@pytest.mark.parametrize("change", ["none", "overwritten", "removed"])
def test_files_that_are_not_those_installed(change, tmp_path, monkeypatch):
    """After a namesake was installed and removed again, half of the package may be its."""
    path = tmp_path / "optimizer.py"
    path.write_bytes(b"original")
    monkeypatch.setattr(installation_module.sophia, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [recorded(path, b"original")])
    if change == "overwritten":
        path.write_bytes(b"another")
    elif change == "removed":
        path.unlink()
    said = texts(list(installation_module._files()), "wrong")
    assert ("1 files of the package are not those that were installed" in said) == (change != "none")


@pytest.mark.parametrize(("version", "status", "text"), [
    ("2.5.1", "wrong", "torch 2.6 or newer is needed"),
    ("2.9.0+cpu", "note", "CVE-2026-24747"),
    ("2.13.0+cpu", "ok", "torch 2.13.0+cpu"),
])  # fmt: skip
def test_versions_of_torch(version, status, text, monkeypatch):
    """An error about a missing attribute, hours later; or a loader that is not safe."""
    monkeypatch.setattr(torch, "__version__", version)
    assert text in texts(of(check_installation(providers={}), "versions"), status)


# ---- the machine


def test_without_the_kernel_it_says_why_and_what_to_do(monkeypatch):
    """A slow step that nobody explains."""
    monkeypatch.setattr(fused_cpu, "unavailable", lambda: "the compiled kernel is not there: no compiler")
    findings = check_machine()
    assert "the compiled kernel is not there: no compiler" in texts(findings, "note")
    assert "float32 on cpu: foreach" in texts(findings, "ok")
    assert not texts(findings, "wrong")


def test_a_path_with_other_numbers_is_wrong(monkeypatch):
    """A library of another version, called with this one's arguments."""
    monkeypatch.setattr(foreach, "step", lambda *columns, **settings: None)
    assert "foreach: other numbers than the rule" in texts(check_machine(), "wrong")


def test_more_threads_than_cores(monkeypatch):
    """A step that is many times slower in a container."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert "torch computes with 999 threads" in texts(check_machine(), "note")


# ---- the model


MODULE = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, ids, labels=None):
        logits = self.head(self.embedding(ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return (logits, loss) if labels is not None else logits


ids = torch.arange(24).reshape(4, 6) % 9
labels = (ids + 1) % 9
loss = lambda model: F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

by_keywords = lambda: (Net(), {"ids": ids, "labels": labels})
by_position = lambda: (Net(), (ids, labels))
by_function = lambda: (Net(), loss)
without_loss = lambda: (Net(), ids)
not_a_pair = lambda: Net()
not_a_model = lambda: (ids, labels)
not_a_number = lambda: (Net(), lambda model: model(ids))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()


wrapper = lambda: (Wrapper(), lambda model: loss(model.net))


class Fused(Net):
    def forward(self, ids, labels):
        return {"logits": None, "loss": super().forward(ids, labels)[1]}


class Distances(Fused):
    def forward(self, ids, labels):
        return {"loss": self.head(self.embedding(ids)).square().mean()}


fused = lambda: (Fused(), (ids, labels))
distances = lambda: (Distances(), (ids, labels))
regression = lambda: (Net(), lambda model: (model(ids) - 1).square().mean())


def settings(model):
    from sophia import Sophia
    return Sophia(model, lr=1e-2, update_every=4, fraction=1.0)


def late(model):
    made = settings(model)
    for group in made.param_groups:
        group["step"] = 1
    return made


def still(model):
    from sophia import Sophia
    return Sophia(model, lr=0.0)


nothing = lambda model: None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "subject_of_the_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "subject_of_the_test:"
    sys.modules.pop("subject_of_the_test", None)


@pytest.mark.parametrize("name", ["by_keywords", "by_position", "by_function"])
def test_model_of_the_user(name, module, capsys):
    """The three ways to say what a training step is."""
    assert main(["--model", module + name, "--optimizer", module + "settings", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    model = [f for f in findings if f["topic"] == "model"]
    assert model[0]["text"] == "Net, 153 parameters"
    output = next(f["data"] for f in findings if f["topic"] == "outputs")
    assert output["shape"] == [4, 6, 9]
    assert (output["counted"], output["predictions"], output["known_by"]) == (24, 24, "gradient")
    refreshes = next(f["data"] for f in findings if "refreshed" in f["data"])
    assert refreshes["refreshed"] == [0, 4, 8, 12, 16]
    assert refreshes["B"] == 24.0


REFUSED = [
    ("without_loss", [], "returned a tensor of shape (4, 6, 9) without a loss"),
    ("not_a_pair", [], "not_a_pair() returned Net. Return a model and a batch"),
    ("not_a_model", [], "returned a tuple of Tensor, Tensor. Return a model and a batch"),
    ("not_a_number", [], "is a tensor of shape (4, 6, 9), not one number in a tensor"),
    ("nowhere", [], "has no 'nowhere'"),
    ("ids", [], "is a Tensor, not a function without arguments"),
    ("by_function", ["--optimizer", "subject_of_the_test:nothing"], "--optimizer made NoneType, not a torch"),
    ("by_function", ["--optimizer", "no_such_module:x"], "'no_such_module' cannot be imported"),
    ("by_function", ["--optimizer", "sophia"], "does not name a class or function. Write module:name"),
    ("by_function", ["--steps", "3"], "--steps is 3"),
]


@pytest.mark.parametrize(("name", "more", "text"), REFUSED)
def test_wrong_use_says_what_to_write(name, more, text, module, capsys):
    """A traceback from inside the doctor, or a verdict about nothing."""
    assert main(["--model", module + name, *more]) == 2
    out = capsys.readouterr()
    assert text in out.err
    assert out.out == ""


WRONG = [
    ("wrapper", [], "ran no forward in training mode"),
    ("distances", [], "Distances returns its loss, one number, and where the predictions are made could not"),
    ("regression", [], "the gradient of your loss in the output of Net is not that of a mean or weighted"),
    ("by_function", ["--optimizer", "subject_of_the_test:late"], "renewed on the steps [3, 7, 11, 15, 19]"),
    ("by_function", ["--optimizer", "subject_of_the_test:still"], "it does not fall"),
]  # fmt: skip


def test_a_model_without_logits_is_right(module, capsys):
    """Its predictions are found in the graph of its loss."""
    assert main(["--model", module + "fused", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert "24 of 24 predictions count" in " | ".join(f["text"] for f in findings)


@pytest.mark.parametrize(("name", "more", "text"), WRONG)
def test_what_is_wrong_with_a_model_is_found(name, more, text, module, capsys):
    """A clean bill for a run that is not Sophia, or does not learn."""
    assert main(["--model", module + name, *more, "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert text in " | ".join(f["text"] for f in findings if f["status"] == "wrong")


def test_another_optimizer_is_run_and_not_judged():
    """Its time and its loss can be compared; whether it is Sophia is the audit's question."""
    findings = check_training(example, torch.optim.SGD, lr=0.1, steps=8)
    assert "SGD is not attached to the model" in texts(findings, "note")
    assert "sophia audit" in texts(findings, "note")
    assert not texts(findings, "wrong")
    assert not any("refreshed" in f.data for f in findings)


def test_a_subclass_gets_the_model():
    """A class derived from Sophia would be given bare parameters, and decay the vectors too."""

    class Mine(Sophia):
        pass

    assert not texts(check_training(example, Mine, steps=8), "wrong")


def test_the_module_that_was_found_is_named():
    """An optimizer that is said to be attached to nothing, before the first forward."""
    findings = check_training(example, lambda model: Sophia(model.parameters(), lr=1e-3), steps=12)
    assert "Sophia records ExampleModel, found by its parameters" in texts(findings, "ok")
    assert not texts(findings, "wrong")
    assert "attached" not in texts(findings, "note")


def test_a_class_that_cannot_be_made_is_wrong():
    """The error of a constructor, as a traceback."""
    findings = check_training(example, lambda model: Sophia(model, lr=-1.0), steps=8)
    assert "the optimizer cannot be made: ValueError: lr=-1.0" in texts(findings, "wrong")


def test_a_loss_that_becomes_nan_is_wrong():
    """Comparisons with NaN are false: it must not count as falling."""
    model = nn.Linear(2, 3)

    def make():
        x, y = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
        losses = iter([1.0] * 5 + [float("nan")] * 50)
        return Subject(model, lambda: nn.functional.cross_entropy(model(x), y) * next(losses))

    findings = check_training(make, torch.optim.SGD, steps=8)
    assert "it does not fall" in texts(findings, "wrong")
