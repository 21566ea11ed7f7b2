"""Checkpoints that other code wrote go on."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sophia.lab.config.run import Run
from sophia.lab.data.tokens import Tokens
from sophia.lab.optimizers import table
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import Stopped
from sophia.lab.support.signals import Request
from sophia.lab.training import checkpoint
from sophia.lab.training.loop import train
from sophia.lab.training.position import Position
from sophia.lab.training.run_folder import Record, rows
from sophia.numerics import words

STOPPED = Path(__file__).parent / "stopped_runs"
# Both orders of a sum are right, and libraries and processors differ in it. The curvature is drawn, so its
# run ends near the recorded one if the draws change, and not on it.
CLOSE = {"adamw": 1e-4, "sophia-g": 2e-2}


def own_text():
    """The text of the recorded runs: 16 different tokens."""
    ids = (np.arange(4000) ** 2 % 97 % 16).astype(np.uint16)
    return Tokens(ids[:3000], ids[3000:], lengths=np.ones(16, dtype=np.int64))


@pytest.mark.parametrize("folder", sorted(path for path in STOPPED.iterdir() if path.is_dir()))
def test_a_checkpoint_of_an_older_release_goes_on(folder, tmp_path):
    """Else an update would cost everybody the runs that are under way."""
    config = from_json(Run, json.loads((folder / "config.json").read_text()))
    # The numbers of these two are today's; a run whose configuration says so is one that goes on.
    numerics = words(table.find(config.optimizer.contender).numerics)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, numerics=numerics))
    own = tmp_path / config.hash  # the name may differ: it is the configuration that must be the same
    own.mkdir()
    (own / "config.json").write_text(json.dumps(to_json(config)))
    shutil.copyfile(folder / "log.jsonl", own / "log.jsonl")
    (own / "checkpoint.pt").write_bytes(gzip.decompress((folder / "checkpoint.pt.gz").read_bytes()))
    result = train(config, tmp_path, own_text())
    assert (result["status"], result["steps"]) == ("finished", 24)
    assert json.loads((own / "attempts.jsonl").read_text())["from_step"] == 13
    found = list(rows(own))
    whole = [json.loads(line) for line in (folder / "whole-log.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in found] == [(row["kind"], row["step"]) for row in whole]
    close = CLOSE[config.optimizer.contender]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in whole], rel=close)
    clipped = [row["gradient_clipped"] for row in whole if row["kind"] == "train"]
    assert [row["gradient_clipped"] for row in found if row["kind"] == "train"] == clipped


def test_what_older_checkpoints_lack_or_have_more_changes_nothing(tiny, ids, tmp_path):
    """Else a state without counts of clipped gradients, or with the part that budgets once shared, would be
    refused, or end elsewhere.
    """
    config = tiny("sophia-g", clip=0.0)
    whole = train(config, tmp_path / "whole", ids)
    request = Request()

    def report(progress):
        request.signal = 15 if progress.step >= 10 else None

    with pytest.raises(Stopped):
        train(config, tmp_path, ids, stop=request, report=report)
    record = Record(tmp_path, config)
    state = checkpoint.load(record.folder)
    assert set(state) == {"model", "optimizer", "random", "log", *Position().to_state()}
    for key in ("clipped_before", "clipped"):
        del state[key]
    state["trunk"] = {"run": "b" * 12, "steps": 10, "seconds": 1.0, "cpu_seconds": 1.0}
    checkpoint.save(record.folder, state)
    result = train(config, tmp_path, ids)
    assert (result["loss"], result["gradient_clipped"]) == (whole["loss"], 0.0)
    assert "trunk" not in result


def test_a_position_comes_back_from_its_state():
    """Else a sum that is forgotten would show in the first row after a resume."""
    position = Position()
    for loss, clipped in ((3.0, True), (2.0, False)):
        with position.clock:
            position.advance(loss, clipped=clipped)
    assert position.means() == (2.5, 0.5)
    position.advance(1.0, clipped=True)
    again = Position.from_state(position.to_state())
    assert again.to_state() == position.to_state()
    assert 0.0 not in again.to_state().values()
    assert again.clipped_share == pytest.approx(2 / 3)
    assert again.means() == (1.0, 1.0)
    assert Position().clipped_share is None
