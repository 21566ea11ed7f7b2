"""Configuration read strictly: what is written comes back, and what is wrong is refused by its name."""

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sophia.lab.config.run import Data, Evaluation, Model, Optimizer, Run, Schedule
from sophia.lab.config.search_space import Kind
from sophia.lab.protocols import protocol_file, recipe
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.protocols.recipe import Recipe
from sophia.lab.support.dataclass_json import LATER, canonical, checked_dataclass, from_json, to_json
from sophia.lab.support.errors import UsageError

RUN = Run(Data("own", "a" * 64, "b" * 64), Optimizer("adamw", {"lr": 1e-3, "name": "x", "on": True, "n": 3}))
READ = {
    Run: to_json(RUN),
    Protocol: to_json(protocol_file.chosen("million", None)),
    Recipe: to_json(recipe.find("gpt2-125m")),
}


SETTINGS = st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def runs(draw):
    """Any run that the types and the relations between fields allow."""
    heads, parts = draw(st.integers(1, 99)), draw(st.integers(1, 99))
    kind = draw(st.sampled_from(["gpt2", "neox"]))
    return draw(
        st.builds(
            Run,
            optimizer=st.builds(
                Optimizer,
                settings=st.dictionaries(st.text(), SETTINGS),
            ),
            model=st.builds(
                Model,
                heads=st.just(heads),
                width=st.integers(1, 99).map(heads.__mul__),
                kind=st.just(kind),
                scale_attention_by_layer=st.booleans() if kind == "gpt2" else st.just(False),
            ),
            schedule=st.builds(Schedule),
            evaluation=st.builds(Evaluation),
            batch=st.integers(1, 99).map(parts.__mul__),
            micro_batches=st.just(parts),
            precision=st.sampled_from(["float32", "bfloat16"]),
        )
    )  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_every_run_comes_back_from_its_json(run):
    """Else a folder could not be read back as the run that made it: a float as an int, a bool as 1, a long
    number rounded.
    """
    again = from_json(Run, json.loads(json.dumps(to_json(run))))
    assert again == run
    assert canonical(to_json(again)) == canonical(to_json(run))
    assert again.hash == run.hash


def places(hint, values, path=()):
    """Every key that a configuration has, with its type: nested ones too, one entry of each mapping."""
    found = [(path, hint)] if path else []
    plain = bare(hint)
    if dataclasses.is_dataclass(plain):
        hints = typing.get_type_hints(plain, include_extras=True)
        return found + [
            p for name, value in values.items() for p in places(hints[name], value, (*path, name))
        ]
    if typing.get_origin(plain) is Mapping and values:
        name, value = next(iter(values.items()))
        return found + places(typing.get_args(plain)[1], value, (*path, name))
    return found


def bare(hint):
    """A type without None."""
    others = [a for a in typing.get_args(hint) if a is not type(None)]
    return others[0] if len(others) == 1 and union(hint) else hint


def union(hint):
    """Whether it is one of several types."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


WRONG = {
    str: st.integers() | st.booleans() | st.lists(st.text()),
    bool: st.integers() | st.text() | st.floats(),
    int: st.text() | st.booleans() | st.floats() | st.lists(st.integers()),
    float: st.text() | st.booleans() | st.just(math.nan) | st.just(math.inf) | st.lists(st.floats()),
    tuple: st.integers() | st.text() | st.dictionaries(st.text(), st.integers()),
    Mapping: st.integers() | st.text() | st.lists(st.integers()),
}


def wrong(hint):
    """Values that a type does not hold; from the type's own words, not from the reader under test."""
    plain = bare(hint)
    nothing = st.nothing() if plain is not hint else st.none()
    if typing.get_origin(plain) is Annotated:
        base, *about = typing.get_args(plain)
        number = st.integers if base is int else st.floats
        outside = [st.nothing()]
        for bound in about:
            low, high = getattr(bound, "ge", None), getattr(bound, "le", None)
            if low is not None:
                outside.append(number(max_value=low).filter(lambda v, low=low: v < low))
            if high is not None:
                outside.append(number(min_value=high).filter(lambda v, high=high: v > high))
        return nothing | WRONG[base] | st.one_of(outside)
    if typing.get_origin(plain) is Literal:
        return nothing | WRONG[str] | st.text().filter(lambda v: v not in typing.get_args(plain))
    if dataclasses.is_dataclass(plain):
        return nothing | WRONG[Mapping]
    if union(plain):  # a setting
        return nothing | st.lists(st.integers()) | st.just(math.inf)
    return nothing | WRONG[typing.get_origin(plain) or plain]


PLACES = [
    pytest.param(kind, path, hint, id=f"{kind.__name__}-{'.'.join(path)}")
    for kind, values in READ.items()
    for path, hint in places(kind, values)
    if hint is not Kind  # has words of its own: tests/lab/protocols/test_protocol.py
]


@pytest.mark.parametrize(("kind", "path", "hint"), PLACES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_wrong_value_is_refused_by_the_name_of_its_key(kind, path, hint, data):
    """Else a bad value would be another value, or an error deep inside a run that names no key."""
    value = data.draw(wrong(hint))
    values = json.loads(json.dumps(READ[kind]))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UsageError) as refused:
        from_json(kind, values)
    assert str(refused.value).startswith(f"{'.'.join(path)} is {json.loads(json.dumps(value))!r}: write ")


TABLES = [pytest.param(kind, (), id=kind.__name__) for kind in READ] + [
    pytest.param(*place.values[:2], id=place.id)
    for place in PLACES
    if dataclasses.is_dataclass(bare(place.values[2]))
]


@pytest.mark.parametrize(("kind", "path"), TABLES)
def test_every_misspelt_key_is_refused_by_its_name(kind, path):
    """Else a misspelt key would silently be the default, at some depth."""
    values = json.loads(json.dumps(READ[kind]))
    inner = values
    for key in path:
        inner = inner[key]
    inner["misspelt"] = 1
    with pytest.raises(
        UsageError, match=f"^{'.'.join(path) or kind.__name__.lower()} has no field 'misspelt'"
    ):
        from_json(kind, values)


def test_all_keys_at_fault_are_named_at_once():
    """Else a file with three mistakes would be corrected in three rounds."""
    values = READ[Run] | {"steps": 0, "stepz": 1, "model": {"widht": 3}}
    with pytest.raises(UsageError) as refused:
        from_json(Run, values)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert "steps is 0: write a whole number from 1." in lines


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model(width=0), "model.width is 0: write a whole number from 1."),
        (lambda: Model(1, 0), "model.width is 0: write a whole number from 1."),
        (lambda: Model(context=1), "model.context is 1: write a whole number from 2."),
        (lambda: Schedule(floor=1.5), "schedule.floor is 1.5: write a number from 0 to 1."),
        (lambda: Schedule(warmup=-3), "schedule.warmup is -3: write a whole number from 0."),
        (lambda: Schedule(kind="line"), "schedule.kind is 'line': write \"cosine\" or \"wsd\"."),
        (lambda: Optimizer("adamw", {"lr": math.inf}), "optimizer.settings.lr is inf: write true or false"),
        (lambda: Schedule(floor=math.nan), "schedule.floor is nan: write a finite number from 0 to 1."),
        (lambda: dataclasses.replace(RUN, seed=2**63), "run.seed is 9223372036854775808: write a whole"),
        (lambda: dataclasses.replace(RUN, clip=-1.0), "run.clip is -1.0: write a number from 0."),
    ],
)  # fmt: skip
def test_a_constructor_is_as_strict_as_a_file(make, message):
    """Else a bound would hold for files alone, and a value from the command line end in a traceback."""
    with pytest.raises(UsageError) as refused:
        make()
    assert str(refused.value).startswith(message)


@checked_dataclass(frozen=True)
class Old:
    """As it was."""

    a: Annotated[int, Ge(0)] = 0


@checked_dataclass(frozen=True)
class New:
    """With a field that was added."""

    a: Annotated[int, Ge(0)] = 0
    b: Annotated[float, Ge(0)] = dataclasses.field(default=0.5, metadata=LATER)
    """Added."""


def test_a_later_field_is_written_where_it_differs_alone():
    """Else every earlier run would get another name when a field is added."""
    assert to_json(New(3)) == to_json(Old(3)) == {"a": 3}
    assert to_json(New(3, 0.25)) == {"a": 3, "b": 0.25}
    assert from_json(New, {"a": 3}) == New(3)


def test_what_a_file_says_and_json_does_not_is_refused_by_its_key():
    """A date of a TOML file, which is no JSON: else a traceback without a key."""
    values: dict[str, Any] = READ[Run] | tomllib.loads("steps = 2026-01-01")
    with pytest.raises(UsageError, match="steps is '2026-01-01': write a whole number from 1"):
        from_json(Run, values)
