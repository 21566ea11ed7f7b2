"""The fingerprints of the contenders' code, against stored ones.

They stand in fingerprints.json beside this file, and are made again by

    python tests/lab/training/test_fingerprint.py --write
"""

import json
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":  # started as a script, to write the fingerprints
    sys.path.insert(0, str(Path(__file__).parents[2]))
from needs import names_of, skip_if_probes_are_others
from sophia.lab.config.run import Model
from sophia.lab.models.build import gpt2
from sophia.lab.optimizers import table
from sophia.lab.optimizers.contender import Contender
from sophia.lab.training import fingerprint as made
from sophia.lab.training.fingerprint import TOLERANCE, difference, fingerprint, kernels
from sophia.numerics import words
from sophia.step import dispatch

STORED = Path(__file__).with_name("fingerprints.json")


@pytest.mark.parametrize("name", names_of(table.CONTENDERS))
def test_a_contenders_numbers_change_with_a_version_alone(name):
    """Else runs of two optimizers would have one name."""
    row, stored = table.find(name), json.loads(STORED.read_text())
    if "hutchinson" in row.numerics:
        skip_if_probes_are_others()
    assert name in stored, "a new contender: write its fingerprint by the command at the top"
    apart = difference(fingerprint(row).numbers, stored[name]["numbers"])
    assert apart <= TOLERANCE or stored[name]["numerics"] != numerics_of(row), (
        f"{name} computes other numbers than it did ({apart:.1e} apart), by its code or by torch's. If that "
        "is meant, raise a version: of the part of Sophia that changed (src/sophia/numerics.py), or "
        "`version` of the contender in its file; then make the fingerprints again by the command at the "
        "top of this file."
    )
    assert stored[name]["numerics"] == numerics_of(row), "a version was raised: make the fingerprints again"


def numerics_of(row):
    return words(row.numerics | {row.name: row.version}, ones=True)


def test_a_fingerprint_leaves_no_trace():
    """Else a run would draw other numbers for having been looked at."""
    made._made.clear()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fingerprint(table.find("sophia-g"))
    assert torch.equal(torch.rand(3), expected)


def test_what_cannot_train_the_small_problem_has_none():
    """Else an optimizer for float32 alone would end its run in an error, after all its steps."""

    def build(model, settings, seed):
        raise RuntimeError("float32 alone")

    row = Contender("picky", "", build, {"lr": 0.1}, {}, 0)
    assert fingerprint(row) is None


def test_a_closure_is_served():
    """Else optimizers with passes of their own would have none."""
    calls = []

    class Counted(torch.optim.SGD):
        def step(self, closure):
            calls.append(float(closure()))
            return super().step()

    asked = Contender(
        "asked", "", lambda m, s, seed: Counted(m.parameters(), lr=0.1), {"lr": 0.1}, {}, 0, closure=True
    )
    assert len(fingerprint(asked).numbers) == 5
    assert len(calls) == made.STEPS


@pytest.mark.parametrize("name", ["sophia-g", "sophia-damped", "sophia-spectral", "adahessian", "adamw"])
def test_the_kernels_that_are_named_are_those_that_ran(name, monkeypatch):
    """Else a record would name a path of the step that was not taken."""
    ran = set()
    do = dispatch.Work.do

    def noted(work):
        ran.add(work.kernel.__name__.rpartition(".")[2])
        do(work)

    monkeypatch.setattr(dispatch.Work, "do", noted)
    model = gpt2(Model(layers=1, width=16, heads=2, context=8), seed=1)
    row = table.find(name)
    optimizer = row.build(model, row.settings({}), 1)
    assert kernels(optimizer) == ""
    x = torch.randint(4096, (2, 8))
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert kernels(optimizer) == ", ".join(sorted(ran))
    assert bool(ran) == (name != "adamw")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    torch.set_num_threads(1)
    content = {
        name: {"numerics": numerics_of(row), "numbers": list(fingerprint(row).numbers)}
        for name, row in table.CONTENDERS.items()
    }
    STORED.write_text(json.dumps(content, indent=1) + "\n")
