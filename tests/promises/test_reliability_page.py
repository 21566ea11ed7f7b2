"""docs/reliability.md: every test that it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
# `tests/file.py`: `test_a`, `test_b`
NAMED = [
    (path, name)
    for path, names in re.findall(r"`(tests/[\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", PAGE)
    for name in re.findall(r"`(test_\w+)`", names)
]


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[f"{path}::{name}" for path, name in NAMED])
def test_the_test_is_there(path, name):
    """A promise that nothing holds any more."""
    assert re.search(rf"^\s*def {name}\(", (ROOT / path).read_text(), re.M)


def test_all_names_of_the_tables_are_read():
    """A row written in another form would be looked at by nobody."""
    tables = PAGE[: PAGE.index("## torch's generic")]
    in_rows = {
        name
        for line in tables.splitlines()
        if line.startswith("| ")
        for name in re.findall(r"`(test_\w+)`", line)
    }
    assert in_rows == {name for _, name in NAMED}
    assert len(NAMED) > 60
