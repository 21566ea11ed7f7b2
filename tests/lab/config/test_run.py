import dataclasses
import json
from pathlib import Path

import pytest

from sophia.lab.config.run import Data, Model, Optimizer, Run, Schedule
from sophia.lab.support.dataclass_json import canonical, from_json, to_json
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
        (["steps"], "many", "steps is 'many': write a whole number from 1"),
        (["steps"], True, "steps is True"),
        (["steps"], 0, "steps is 0"),
        (["batch"], 15, "multiple of 2"),
        (["clip"], -1, "clip is -1: write a number from 0"),
        (["device"], "abacus", '"cpu" or "cuda"'),
        (["model", "heads"], 5, "heads = 4"),
        (["model", "context"], 1, "model.context is 1"),
        (["model"], 3, "model is 3: write a table with the fields layers"),
        (["schedule", "kind"], "line", 'kind is .line.: write "cosine" or "wsd"'),
        (["schedule", "floor"], 1.5, "floor is 1.5: write a number from 0 to 1"),
        (["optimizer", "settings"], [1], "settings is .*: write a table of values by name"),
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


RESULTS = Path(__file__).parents[3] / "results"


def committed():
    """The configurations of all recorded runs, each with the name of its run."""
    for path in RESULTS.rglob("config.json"):
        yield path.parent.name, json.loads(path.read_text())
    for path in RESULTS.rglob("runs.jsonl"):
        for line in path.read_text().splitlines():
            run = json.loads(line)
            yield run["run"], run["config"]


def test_every_recorded_run_is_still_named_by_its_configuration():
    """Else finished runs would be done again: a bound too narrow, a number read as another, a key more."""
    found = list(committed())
    assert len(found) > 300
    for name, values in found:
        run = from_json(Run, values)
        assert run.hash == name
        assert canonical(to_json(run)) == canonical(values)
