import dataclasses
import json

import pytest

from sophia.lab.config.run import Data, Model, Optimizer, Run, Schedule
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import UsageError

RUN = Run(
    data=Data("own", "a" * 64, "b" * 64), optimizer=Optimizer("adamw", {"lr": 1e-3, "name": "x", "on": True})
)


def test_json_round_trip_keeps_the_run_and_its_name():
    """Else a folder could not be read back as the run that made it."""
    again = from_json(Run, json.loads(json.dumps(to_json(RUN))))
    assert again == RUN
    assert again.hash == RUN.hash


def test_the_name_depends_on_every_field():
    """Else two different runs would share a folder, and the second would get the result of the first."""
    changes = [
        {"steps": 401},
        {"seed": 2},
        {"threads": 2},
        {"schedule": Schedule(warmup=21)},
        {"model": Model(layers=2)},
        {"optimizer": Optimizer("adamw", {"lr": 1.1e-3, "name": "x", "on": True})},
    ]
    names = {dataclasses.replace(RUN, **change).hash for change in changes} | {RUN.hash}
    assert len(names) == len(changes) + 1


def test_the_name_is_the_same_on_every_machine():
    """Else moved records would be done again. A change of this value changes every run's name."""
    assert RUN.hash == "695b54978520"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["stepz"], 3, "no field 'stepz'"),
        (["model", "widht"], 3, "model has no field 'widht'"),
        (["steps"], "many", "Write a int"),
        (["steps"], True, "steps is True"),
        (["steps"], 0, "steps is 0"),
        (["batch"], 15, "multiple of 2"),
        (["clip"], -1, "not negative"),
        (["device"], "abacus", '"cpu" or "cuda"'),
        (["model", "heads"], 5, "heads = 4"),
        (["model", "context"], 1, "model.context is 1"),
        (["model"], 3, "several fields"),
        (["schedule", "kind"], "line", "names no schedule"),
        (["schedule", "floor"], 1.5, "fraction"),
        (["optimizer", "settings"], [1], "plain values by name"),
        (["seed"], -1, "seed is -1"),
    ],
)
def test_bad_values_are_refused_by_name(path, value, message):
    """Else a misspelt or impossible field would be ignored or fail deep inside a run."""
    values = to_json(dataclasses.replace(RUN, micro_batches=2))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UsageError, match=message):
        from_json(Run, values)


def test_a_missing_field_is_named():
    """Else an old or cut file would run with a default nobody chose."""
    values = to_json(RUN)
    del values["data"]["text"]
    with pytest.raises(UsageError, match=r"data lacks the field 'text'"):
        from_json(Run, values)
