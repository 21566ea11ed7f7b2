"""Whole models that carry the hooks: saved, scripted, traced, exported."""

import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia


def attached():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    opt = Sophia(model, update_every=1)
    return model, opt


def train(model, opt, steps=2):
    x, y = torch.randn(8, 3), torch.arange(8) % 4
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def test_a_whole_model_loads_where_this_library_is_not_installed(tmp_path):
    """``torch.save(model)`` in training, loaded by a server without the optimizer."""
    model, opt = attached()
    train(model, opt)
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(2, 3)
    torch.save({"x": x, "y": model(x).detach()}, tmp_path / "data.pt")
    code = """
    import sys
    sys.modules["sophia"] = None  # an import of it raises
    import torch
    model = torch.load("model.pt", weights_only=False)
    data = torch.load("data.pt")
    assert torch.equal(model(data["x"]), data["y"])
    model(data["x"]).sum().backward()  # in training mode, with gradients
    torch.save(model, "again.pt")
    torch.load("again.pt", weights_only=False)(data["x"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_loaded_model_can_be_copied_and_trained_again(copier):
    """Hooks that do nothing must survive what hooks survive."""
    twin = copier(pickle.loads(pickle.dumps(attached()[0])))
    opt = Sophia(twin, update_every=1)
    train(twin, opt)
    assert opt.stats()["refreshes"] == 2


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripting_is_refused_with_a_sentence_until_detached():
    """It ended in an AttributeError of ours that told nobody what to do."""
    model, opt = attached()
    train(model, opt)
    with pytest.raises(AttributeError, match=r"compiles the hooks .*Call opt.detach\(\) first"):
        torch.jit.script(model)
    opt.detach()
    x = torch.randn(2, 3)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    opt.attach(model)
    train(model, opt)
    assert opt.stats()["refreshes"] == 4


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_tracing_and_export_work_and_are_no_training_forwards(how):
    """They would be recorded: inputs of another kind, and rows that are in no loss."""
    model, opt = attached()
    x = torch.randn(2, 3)
    if how == "trace":
        made = torch.jit.trace(model, (x,))
    else:
        made = torch.export.export(model, (x,), strict=False).module()
    assert opt._recorder.recordings == []
    with torch.no_grad():
        assert torch.allclose(made(x), model.eval()(x))
    train(model.train(), opt)
    assert opt.stats()["B"] == 1
