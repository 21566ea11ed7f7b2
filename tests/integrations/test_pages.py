"""docs/hosts: every page is in the index, every example is short and somebody runs it."""

from pathlib import Path

import pytest
from pages import FOLDER, examples

PAGES = sorted(path.name for path in FOLDER.glob("*.md"))
EXAMPLES = [(page, title) for page in PAGES for title in examples(page)]
TESTS = " ".join("".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py")).split())


@pytest.mark.parametrize("page", PAGES)
def test_the_index_names_the_page(page):
    """A page that nobody finds."""
    assert f"](hosts/{page})" in FOLDER.with_suffix(".md").read_text()


@pytest.mark.parametrize(("page", "title"), EXAMPLES)
def test_examples_are_short_and_run_by_a_test(page, title):
    """An example that nobody has run, or nobody reads."""
    assert len(examples(page)[title].splitlines()) <= 25
    assert f'"{page}", "{title}"' in TESTS


@pytest.mark.parametrize("page", PAGES)
def test_no_code_escapes(page):
    """A block outside the headings that the tests look under would be an example that nobody runs."""
    assert (FOLDER / page).read_text().count("```python") == len(examples(page)) >= 1
