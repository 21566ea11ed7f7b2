"""Tables of the pages against the records that they name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import ablate_own_rules
import pytest
import tables

from sophia.lab.analysis.made_by import other_code
from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.analysis.verdict import judge
from sophia.lab.analysis.verdict_words import difference_words

ROOT = Path(__file__).parents[2]
HEAD = re.compile(r"(?m)^\| contender .*speed-up in steps|^\| searched ")
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if HEAD.search(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_table_is_what_its_record_says(page: Path) -> None:
    """A figure that nobody can make again: of older records, of older statistics, or mistyped."""
    text = page.read_text(encoding="utf-8")
    assert tables.made_again(text, ROOT) == text, f"write: python studies/own_rules/tables.py --write {page}"
    assert len(tables.MARKED.findall(text)) == len(HEAD.findall(text)) > 0


def test_a_wrong_figure_is_found() -> None:
    """The test above would pass if marks were not understood."""
    text = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    wrong = re.sub(r"(?m)^\| muon \| \d", "| muon | 9", text, count=1)
    assert wrong != text
    assert tables.made_again(wrong, ROOT) == text


def test_a_table_of_older_numerics_says_so(tmp_path: Path) -> None:
    """Else a reader takes it for today's rule."""
    today, older = ROOT / "results" / "comparisons" / "quick", tmp_path / "older"
    shutil.copytree(today, older)
    runs = older / "runs.jsonl"
    runs.write_text(runs.read_text().replace('"numerics": "gnb 3', '"numerics": "gnb 2'))
    said = tables.table(older, None, None).splitlines()[-1]
    assert said.startswith("Older numerics: 4 of 8 runs")
    assert "gnb 2; today gnb 3" in said
    assert tables.table(today, None, None).splitlines()[-1].startswith("| ")
    page = "<!-- tables.py older -->\n\nprose\n"
    once = tables.made_again(page, tmp_path)
    assert said in once
    assert once.endswith(".\n\nprose\n")
    assert tables.made_again(once, tmp_path) == once


def test_the_table_of_parts_is_what_its_record_says() -> None:
    """The same for what each part of a rule is worth."""
    mark = "<!-- ablate_own_rules.py --table results/studies/own-rules/ablation.jsonl -->\n"
    _, _, after = (ROOT / "docs" / "research.md").read_text(encoding="utf-8").partition(mark)
    expected = ablate_own_rules.table(ROOT / "results" / "studies" / "own-rules" / "ablation.jsonl")
    assert after.startswith(expected)


def test_the_first_page_says_what_its_record_says() -> None:
    """The one figure that everybody reads."""
    evidence = read_evidence(ROOT / "results" / "comparisons" / "first")
    assert not other_code(evidence.runs), "make it again: nobody can repeat it with today's numerics"
    summary = judge(evidence)
    published, spectral = summary.verdicts
    ends = {row.contender: row.loss for row in summary.rows if row.steps == 300}
    ratio = published.speedups[0].ratio
    most, least = 1 / ratio.low, 1 / ratio.high
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"the published rule, tuned with as many trials as AdamW, is **{published.word}**: "
        f"loss {ends['sophia-g']:.3f} against {ends['adamw']:.3f} after 300 steps "
        f"({difference_words(published.difference)}); it needs {1 / ratio.value:.2f} times the steps for the "
        f"same loss ({least:.2f} to {most:.2f})."
    ) in text
    assert (
        f'`rule="spectral"` is **{spectral.word}**: loss {ends["sophia-spectral"]:.3f} '
        f"({difference_words(spectral.difference)}), in less than half of AdamW's steps."
    ) in text
    assert spectral.speedups[0].ratio.value > 2
