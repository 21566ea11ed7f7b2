import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophia.lab.records.packed_run import FILES, NotPackable, columns, files_of, pack_line, rows_of

TRAIN = {"unclipped": 0.05, "kind": "train", "step": 5, "loss": 8.3}
GOOD = {
    "config.json": b'{\n "seed": 1\n}\n',
    "log.jsonl": b'{"kind": "eval", "step": 0, "loss": 8.4}\n{"kind": "train", "step": 5, "loss": 1e-05}\n',
    "result.json": b'{\n "status": "finished",\n "loss": 0.30000000000000004\n}\n',
    "attempts.jsonl": b'{"from_step": 0}\n{"from_step": 5}\n',
}
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["kind", "step", "loss", "lr", "h"]), VALUES, max_size=5), max_size=12
)


def test_a_run_comes_back_byte_for_byte():
    """A packed record that is not the record that was made."""
    assert files_of(json.loads(pack_line("abc", GOOD))) == GOOD
    assert set(GOOD) == set(FILES)


@given(ROWS)
def test_any_log_survives_its_columns(rows):
    """Rows whose keys come and go, in any order, that are mixed up or lost: key order counts too."""
    back = rows_of(json.loads(json.dumps(columns(rows))))
    assert [list(row.items()) for row in back] == [list(row.items()) for row in rows]


def test_rows_of_one_kind_share_a_table():
    """A pack as large as the folders it replaces."""
    rows = [{"kind": "eval", "step": 0}, *({**TRAIN, "step": s} for s in range(1, 4))]
    log = columns(rows)
    assert log["order"] == [0, 1, 1, 1]
    assert log["tables"][1]["kind"] == "train"
    assert log["tables"][1]["step"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("result.json", b'{"loss": 1.0}\n', "result.json is not written as the lab writes it"),
        ("result.json", b'{\n "loss": NaN\n}\n', "NaN or infinity"),
        ("config.json", b"[]\n", "config.json holds no JSON object"),
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b'{\n "a": "\xff"\n}\n', "config.json is not written as the lab writes it"),
        ("log.jsonl", b'{"step": 1}\n{"st', "log.jsonl, line 2, is not JSON"),
        ("log.jsonl", b'{"step": 1}', "log.jsonl is not written"),
        ("log.jsonl", b'{"step": 1, "step": 1}\n', "log.jsonl is not written"),
        ("attempts.jsonl", b"3\n", "attempts.jsonl, line 1, holds no JSON object"),
    ],
)
def test_what_would_not_come_back_is_refused(file, data, words):
    """Bytes that packing changes in silence."""
    with pytest.raises(NotPackable, match=words):
        pack_line("abc", GOOD | {file: data})


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (3, "no order and tables"),
        ({"order": []}, "no order and tables"),
        ({"order": [0], "tables": [7]}, "not an object"),
        ({"order": [1], "tables": [{"step": [0]}]}, "a table that is not there"),
        ({"order": [True], "tables": [{}, {"step": [0]}]}, "a table that is not there"),
        ({"order": [0, 0], "tables": [{"step": [0]}]}, "'step' has not one value"),
        ({"order": [0], "tables": [{"step": [0, 5]}]}, "'step' has not one value"),
        ({"order": [0], "tables": [{"step": 0}]}, "'step' has not one value"),
    ],
)
def test_columns_that_do_not_fit_are_refused(log, words):
    """Values of one row that slip into another."""
    with pytest.raises(ValueError, match=words):
        rows_of(log)
