"""docs/drop-in.md and docs/doctor.md: what they show runs as it stands; cells that can be read."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.doctor.given_model import _made
from sophia.doctor.trial_steps import check_training

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_drop_in():
    """The first lines that a user copies."""
    by_replay, by_hand = blocks("drop-in.md")
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    ids = torch.arange(12).reshape(3, 4) % 5
    names = {"Sophia": Sophia, "model": model, "params": list(model.parameters())}
    names["micro_batches"] = [(ids, ids != 0)] * 2
    exec(by_replay, names)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    names["opt"].step()
    assert names["opt"].stats()["refreshes"] == 1
    exec(by_hand, names)
    assert names["opt"].stats()["B"] == 2 * int((ids != 0).sum())


def test_doctor():
    """The two functions that a user writes for the doctor."""
    (block,) = blocks("doctor.md")
    ids = torch.arange(12).reshape(3, 4) % 5

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))

        def forward(self, input_ids, labels=None):
            logits = self.net(input_ids)
            return (
                logits
                if labels is None
                else (F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)
            )

    names = {"build_model": Model, "ids": ids, "labels": ids, "cross_entropy": F.cross_entropy}
    exec(block, names)
    for name in ("make", "make_with_a_loop_of_its_own"):
        findings = check_training(lambda name=name: _made(names[name](), name), steps=8, lr=1e-2)
        assert not [f.text for f in findings if f.status == "wrong"]


@pytest.mark.parametrize("page", ["drop-in.md", "losses.md", "doctor.md", "glossary.md"])
def test_no_cell_is_a_paragraph(page):
    """A table that nobody reads."""
    rows = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("|")]
    assert max(len(cell.split()) for row in rows for cell in row.split("|")) <= 60
