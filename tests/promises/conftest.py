"""Cases of the tables that are known to be open: expected to fail, and listed in one place."""

from pathlib import Path

import pytest

OPEN = {
    line
    for line in (Path(__file__).with_name("open_cases.txt")).read_text().splitlines()
    if line and not line.startswith("#")
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid in OPEN:
            # Not strict: some are statistical, and pass by chance on another processor.
            item.add_marker(pytest.mark.xfail(reason="open, see open_cases.txt", strict=False))
