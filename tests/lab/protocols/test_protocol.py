import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from sophia.lab.analysis.verdict import Row
from sophia.lab.config.protocol_parts import Entry
from sophia.lab.config.run import Data
from sophia.lab.config.search_space import Choice, LogRange
from sophia.lab.jobs.compare import reached
from sophia.lab.protocols import freeze, protocol_file
from sophia.lab.protocols.protocol import Protocol
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import UsageError
from sophia.lab.training.loop import train
from sophia.lab.training.run_folder import rows

DATA = Data("own", "a" * 64, "b" * 64)
TINY = protocol_file.chosen("tiny", None)


@pytest.mark.parametrize("name", protocol_file.presets())
def test_each_preset_survives_being_written(name, tmp_path):
    """Else the tuned protocol of a sweep would be another comparison than the one that was searched for."""
    protocol = protocol_file.chosen(name, None)
    path = tmp_path / "again.toml"
    path.write_text(protocol_file.text_of(protocol))
    assert protocol_file.load(path) == protocol
    assert from_json(Protocol, to_json(protocol)).hash == protocol.hash


RECORDS = sorted((Path(__file__).parents[3] / "results").rglob("protocol.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_protocol_of_a_record_is_read_back(path):
    """Else nobody could make a committed record again but by the file that it once came from."""
    frozen = json.loads(path.read_text())["protocol"]
    read = to_json(protocol_file.load(path))
    assert {name: read[name] for name in frozen} == frozen


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds no JSON object"),
        ('{"runs": []}', "is no protocol.json of a comparison"),
        ('{"protocol": {"sedes": 3}}', "mine.json: .*no field 'sedes'"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_another_json_file_is_refused(content, message, tmp_path):
    """Else the plan of a comparison, or a run's configuration, would be half read as a protocol."""
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        protocol_file.load(path)


# From the code before protocols were files; those with the numerics of their contender are younger.
NAMES = [
    ("quick", "adamw", 800, {}, "fa2c64101713"),
    ("quick", "sophia-g", 400, {}, "16d35d0fb537"),
    ("small", "muon", 3000, {"lr": 1e-3}, "fc3699962580"),
    (
        "million",
        "signum",
        400,
        {"lr": 3e-4, "weight_decay": 0.3, "warmup": 0.05, "beta": 0.6},
        "e20122417003",
    ),
]


@pytest.mark.parametrize(("name", "contender", "steps", "over", "run"), NAMES)
def test_the_runs_of_a_preset_keep_their_names(name, contender, steps, over, run):
    """Else finished runs would be done again, and records would name runs that no protocol makes."""
    protocol = protocol_file.chosen(name, None).with_contenders([contender])
    planned = protocol.run(contender, data=DATA, seed=1, steps=steps, over=over)
    first = dataclasses.replace(planned, optimizer=dataclasses.replace(planned.optimizer, numerics=""))
    assert first.hash == run
    assert (planned == first) == (contender not in ("sophia-g",)), (
        "numerics of first versions are not written"
    )


BAD = {
    "unknown key": ("sedes = 3", "protocol has no field 'sedes'"),
    "unknown inner key": ("schedule = { warm = 0.1 }", "schedule has no field 'warm'"),
    "missing key": ("batch =", "lacks the field 'batch'"),
    "not TOML": ("batch = = 4", "cannot be read as a protocol"),
    "no list": ("seeds = 3", "seeds is 3: write a list"),
    "twice": ("seeds = [1, 1]", "each once"),
    "no seed": ("seeds = []", "needs one at least"),
    "seed of the search": ("seeds = [1, 100]", "search.seed is 100"),
    "look in between": ('stopping = "when it looks good"', "hold for no rule but"),
    "no baseline": ('baseline = "lion"', r"Add \[contenders.lion\]"),
    "warm-up": ("schedule = { warmup = 20 }", "schedule.warmup is 20: write a number from 0 to 1"),
    "own warm-up": (
        "contenders = { adamw = { warmup = 2.0 } }",
        "contenders.adamw.warmup is 2.0: write a number from 0 to 1",
    ),
    "evaluations": ("evaluation = { times = 0 }", "evaluation.times is 0"),
    "contender": ("contenders = { adamw = {}, adam = {} }", "no contender 'adam'"),
    "path as a name": ("contenders = { adamw = {}, '../x' = {} }", "may lead out of its folder"),
    "setting": ("contenders = { adamw = { settings = { gama = 1 } } }", "adamw has no setting 'gama'"),
    "own class under a known name": ("contenders = { adamw = { optimizer = 'x:Y' } }", "cannot mean two"),
    "trials": ("search = { trials = 0 }", "search.trials is 0"),
    "space of nobody": ("search = { spaces = { lion = {} } }", "search.spaces has 'lion'"),
    "space of no setting": ("search = { spaces = { adamw = { gamma = [1] } } }", "no setting of adamw"),
    "range upside down": (
        "search = { spaces = { adamw = { lr = { low = 2, high = 1 } } } }",
        "0 < low < high",
    ),
    "choice out of order": ("search = { spaces = { adamw = { beta1 = [0.9, 0.8] } } }", r"\[0.8, 0.9\]"),
    "choice of two types": ("search = { spaces = { adamw = { beta1 = [0.9, 'x'] } } }", "cannot draw from"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_with_its_name_and_the_key(line, message, tmp_path):
    """Else a misspelt key would silently be the default, and the comparison not the one that was written."""
    values = tomllib.loads(protocol_file.text_of(TINY))
    values.pop(line.split()[0], None)
    text = "" if line.endswith(" =") else line + "\n"
    path = tmp_path / "mine.toml"
    path.write_text(text + tomli_w.dumps(values))
    with pytest.raises(UsageError, match=rf"(?s)mine\.toml.*{message}"):
        protocol_file.load(path)


def test_the_protocol_in_the_docs_is_one(tmp_path):
    """Else the first thing a reader copies would not work."""
    page = (Path(__file__).parents[3] / "docs" / "protocols.md").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    protocol = protocol_file.load(path)
    assert protocol.space("adamw") == {
        "lr": LogRange(1e-3, 1e-1), "beta2": Choice((0.9, 0.95, 0.99)), "warmup": Choice((0.1, 0.2))
    }  # fmt: skip
    assert protocol.run("sophia-g", data=DATA, seed=1, steps=40).schedule.warmup == 8
    assert protocol.run("adamw", data=DATA, seed=1, steps=40).schedule.warmup == 4


def test_a_protocol_is_chosen_once(tmp_path):
    """Else one of two protocols would be ignored."""
    with pytest.raises(UsageError, match="Give one of them"):
        protocol_file.chosen("tiny", tmp_path / "mine.toml")
    with pytest.raises(UsageError, match="no preset 'huge'"):
        protocol_file.chosen("huge", None)


def test_another_protocol_is_refused_by_the_folder_of_the_first(tmp_path):
    """Else numbers of two comparisons would stand in one table."""
    frozen = {"protocol.json": {"hash": TINY.hash, "protocol": to_json(TINY)}}
    assert not freeze.check(tmp_path / "c", frozen, what="comparison")
    freeze.write(tmp_path / "c", frozen)
    assert freeze.check(tmp_path / "c", frozen, what="comparison")
    other = dataclasses.replace(TINY.with_settings({"adamw": {"lr": 2e-3}}), clip=2.0)
    changed = {"protocol.json": {"hash": other.hash, "protocol": to_json(other)}}
    with pytest.raises(UsageError, match=r"differs in clip, contenders\.adamw\.settings\.lr\."):
        freeze.check(tmp_path / "c", changed, what="comparison")


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SETTINGS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | FLOATS
LABELS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._+=-]{0,9}\Z")


@settings(deadline=None)
@given(
    st.dictionaries(LABELS, st.dictionaries(st.text(), SETTINGS), min_size=1),
    st.text(),
    st.none() | st.floats(1, 9),
)
def test_a_protocol_comes_back_from_its_file(entries, about, target):
    """Else a tuned setting would be another number, or a strange name would break the file."""
    protocol = dataclasses.replace(
        TINY,
        about=about,
        target=target,
        baseline=next(iter(entries)),
        contenders={label: Entry(settings=mine) for label, mine in entries.items()},
    )
    again = from_json(Protocol, tomllib.loads(protocol_file.text_of(protocol)))
    assert again == protocol
    assert again.hash == protocol.hash


ROOT = Path(__file__).parents[3]
COMMITTED = sorted(
    path
    for folder in ("results", "studies")
    for path in (ROOT / folder).rglob("*.toml")
    if path.name != "missing-commits.toml"  # no protocol
)


@pytest.mark.parametrize("path", COMMITTED, ids=["/".join(path.parts[-2:]) for path in COMMITTED])
def test_the_protocols_of_records_and_studies_are_still_read(path):
    """Else a search that took hours could not be compared with again."""
    protocol_file.load(path)


def test_runs_of_wsd_are_equal_bit_for_bit_until_one_decays(ids, text, tmp_path):
    """Else several budgets would not be points of one long training, which the schedule is there for."""
    protocol = dataclasses.replace(
        TINY, log_every=1, schedule=dataclasses.replace(TINY.schedule, kind="wsd", decay=0.5)
    )
    data = Data(text.name, text.sha256, "b" * 64)
    logs = []
    for steps in (20, 40):
        config = protocol.run("sophia-g", data=data, seed=1, steps=steps)
        train(config, tmp_path, ids)
        kept = [r for r in rows(tmp_path / config.hash) if r["kind"] == "train"]
        logs.append([(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in kept])
    assert logs[0][:10] == logs[1][:10]
    assert logs[0][11:] != logs[1][11:20]  # there the shorter decays


def test_the_target_counts_ends_of_whole_schedules():
    """Else a loss that a long run passes on its way would be called a budget."""
    blank = {f.name: None for f in dataclasses.fields(Row)}
    made = [
        Row(**{**blank, "contender": name, "steps": steps, "loss": loss, "diverged": 0})
        for name, steps, loss in [("a", 20, 5.1), ("a", 40, 4.9), ("b", 20, 5.2), ("b", 40, 5.1)]
    ]
    assert reached(made, 5.0) == "Smallest budget that reaches 5 nats: a 40 steps, b not."
