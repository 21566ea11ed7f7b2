"""The page of claims: complete, made from the records, and the one that is in docs."""

import dataclasses
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from sophia.lab import cli, experiments
from sophia.lab.experiments.framework import runner
from sophia.lab.experiments.framework.claims import CLAIMS
from sophia.lab.experiments.framework.claims_page import NOT_RUN, PICTURES, page
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records

ROOT = Path(__file__).parents[4]
WORDS = ("title", "claim", "scale", "expected", "runtime", "figure", "record")


def numbers(quick, records, progress):
    for case in records.left([{"x": x} for x in range(3)], progress):
        records.add(case, y=1)


EXAMPLE = Experiment(
    name="numbers",
    claims=(2, 3),
    run=numbers,
    draw=lambda records: None,
    verdict=lambda records: Verdict("holds in part", f"{len(records.rows)} of them."),
    **{word: f"the {word}" for word in WORDS},
)


def rows(text):
    """The table: number -> cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_claim_has_a_row_even_without_an_experiment(tmp_path):
    """A claim that is silently missing."""
    found = rows(page([], tmp_path, link="x"))
    assert [int(cells[0]) for cells in found] == [c.number for c in CLAIMS] == list(range(1, 9))
    assert all(cells[2] == f"**{NOT_RUN}**" for cells in found)


def test_a_record_that_is_not_finished_gives_no_verdict(tmp_path):
    """A verdict from half of the rows."""
    records = Records(tmp_path / "numbers")
    records.open("numbers", version=1, quick=False, environment={})
    records.add({"x": 0}, y=1)
    text = page([EXAMPLE], tmp_path, link="x")
    assert "holds in part" not in text.split("| | claim")[1]
    assert "*Result.* **not finished**: 1 rows so far." in text
    assert "*Result.* **not run yet**." in page([EXAMPLE], tmp_path / "elsewhere", link="x")


def test_a_finished_record_gives_its_verdict_under_each_of_its_claims(tmp_path):
    """A table that does not follow the records."""
    runner.run(EXAMPLE, tmp_path, Progress())
    text = page([EXAMPLE], tmp_path, link="../records")
    found = rows(text)
    assert [cells[2] for cells in found if "numbers" in cells[3]] == ["**holds in part**"] * 2
    assert "[rows](../records/numbers/records.jsonl)" in text
    assert "*Result.* 3 of them. **holds in part**" in text
    assert text.count("*Scale.* the scale") == 1
    assert "**holds in part**: see claim 2." in text
    changed = dataclasses.replace(EXAMPLE, verdict=lambda records: Verdict("contradicted", "No."))
    assert "**contradicted**" in page([changed], tmp_path, link="x")


def test_the_command_writes_the_page_and_sees_when_it_is_old(tmp_path, capsys):
    """A check that finds everything in order."""
    out = tmp_path / "docs" / "claims.md"
    options = ["claims", "--out", str(out), "--records", str(tmp_path / "records")]
    with pytest.raises(SystemExit) as end:
        cli.main([*options, "--check"])
    assert end.value.code == 1
    assert "is not what the records say. Write: sophia claims" in capsys.readouterr().err
    cli.main(options)
    cli.main([*options, "--check"])
    assert "is what the records say" in capsys.readouterr().out
    out.write_text(out.read_text().replace(NOT_RUN, "holds", 1))
    with pytest.raises(SystemExit):
        cli.main([*options, "--check"])


@pytest.mark.skipif(not (ROOT / "results").exists(), reason="the records are not in the source distribution")
def test_the_page_in_docs_is_what_the_records_say():
    """A claim on the page that no record holds. Mend: sophia claims"""
    expected = page(experiments.every(), ROOT / "results/experiments", link="../results/experiments")
    assert (ROOT / "docs/claims.md").read_text() == expected
    for name in experiments.NAMES:
        folder = ROOT / "results/experiments" / name
        if Records(folder).finished:
            assert (ROOT / "docs" / PICTURES / f"{name}.png").exists(), "write: sophia claims"


def test_the_command_draws_the_pictures_that_the_page_shows(tmp_path, capsys, monkeypatch):
    """A page of claims with broken pictures, or old ones."""
    monkeypatch.setattr(experiments, "every", lambda: [drawn])
    drawn = dataclasses.replace(EXAMPLE, draw=lambda records: Figure(figsize=(1, 1)))
    runner.run(drawn, tmp_path / "records", Progress())
    options = ["claims", "--out", str(tmp_path / "claims.md"), "--records", str(tmp_path / "records")]
    cli.main(options)
    (picture,) = tmp_path.rglob("*.png")
    link = picture.relative_to(tmp_path).as_posix()
    assert f"![the title]({link})" in (tmp_path / "claims.md").read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    cli.main([*options, "--check"])
    picture.unlink()
    with pytest.raises(SystemExit):
        cli.main([*options, "--check"])
    assert "is not there" in capsys.readouterr().err


def test_every_experiment_bears_on_a_claim():
    """An experiment that the page does not show."""
    for experiment in experiments.every():
        assert experiment.claims, experiment.name
