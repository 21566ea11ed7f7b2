"""The keys of records: those that are declared are those that are written, and those that are read."""

import typing

import pytest

from sophia.lab.analysis import cost_ratio
from sophia.lab.config.record_format import EndNumber, EndRow, EvaluationRow, SharedPart, TrainRow
from sophia.lab.report import page_data
from sophia.lab.training import trackers
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import rows

OWN = "unclipped"


def keys(row):
    """Declared keys in their order, without those that a row may lack."""
    return [key for key in row.__annotations__ if key in row.__required_keys__]


@pytest.mark.parametrize("contender", ["adamw", "sophia-g"])
def test_a_run_writes_the_declared_keys_in_their_order(contender, tiny, ids, tmp_path):
    """Else a key would be declared that nobody writes, or records would change their shape unseen."""
    config = tiny(contender)
    result = train(config, tmp_path, ids)
    assert list(result) == keys(EndRow)
    for row in rows(tmp_path / config.hash):
        if row["kind"] == "eval":
            assert list(row) == keys(EvaluationRow)
        else:
            assert [key for key in row if key in keys(TrainRow)] == keys(TrainRow)
            assert list(row)[-len(keys(TrainRow)) :] == keys(TrainRow)  # the optimizer's own stand in front
            assert (OWN in row) == (contender == "sophia-g")


def test_what_readers_look_for_is_declared():
    """Else a reader would look for a key that no run writes, and report a gap."""
    of_a_row, of_the_end = set(keys(TrainRow)) - {"kind", "step"}, typing.get_args(EndNumber)
    assert set(of_the_end) == set(keys(EndRow)) - {"status", "environment"}
    assert {key for key, _ in cost_ratio.COSTS} <= set(of_the_end)
    assert set(trackers._TRAINING) == of_a_row
    assert set(page_data.AXES) - {"flops"} <= {*of_a_row, "step"}
    assert {"loss", "lr", "grad_norm", "gradient_clipped", OWN} <= set(page_data.KNOWN)
    assert set(SharedPart.__annotations__) == {"run", "steps", "seconds", "cpu_seconds"}
