"""What every experiment relies on: records that resume, one of four verdicts, pictures from records."""

import dataclasses
import json
import signal

import pytest
from matplotlib.figure import Figure

from sophia import numerics
from sophia.lab import cli, experiments
from sophia.lab.experiments.framework import runner
from sophia.lab.experiments.framework.claims_page import page
from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.older_numerics import notice
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.support.errors import LabError, Stopped, UsageError
from sophia.lab.support.signals import Request

WORDS = ("claim", "scale", "expected", "runtime", "figure", "record", "title")


def squares(quick, records, progress):
    for case in records.left([{"x": x} for x in range(3 if quick else 5)], progress):
        records.add(case, square=case["x"] ** 2, nothing=float("nan"))


def draw(records):
    figure = Figure()
    figure.subplots().plot([row.result["square"] for row in records.rows])
    return figure


EXAMPLE = Experiment(
    name="squares",
    claims=(),
    run=squares,
    draw=draw,
    verdict=lambda records: Verdict("holds", f"{len(records.rows)} squares."),
    **dict.fromkeys(WORDS, "text"),
)


class StopAt(Progress):
    """Asks to stop when a case is reached."""

    def __init__(self, at):
        super().__init__(Request())
        self.at = at

    def case(self, number, of, what):
        if number == self.at:
            self.stop.signal = signal.SIGTERM


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    """Hours of work done again, or rows that are there twice."""
    with pytest.raises(Stopped) as stopped:
        runner.run(EXAMPLE, tmp_path, StopAt(2))
    assert stopped.value.code == 128 + signal.SIGTERM
    records = Records(tmp_path / "squares")
    assert [row.case["x"] for row in records.rows] == [0, 1]
    assert not records.finished
    runner.run(EXAMPLE, tmp_path, Progress())
    records = Records(tmp_path / "squares")
    assert [row.case["x"] for row in records.rows] == [0, 1, 2, 3, 4]
    assert records.finished


def test_a_line_that_a_kill_cut_short_is_done_again(tmp_path):
    """A record that cannot be read any more, or two rows glued to one line."""
    runner.run(EXAMPLE, tmp_path, Progress())
    path = tmp_path / "squares" / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    runner.run(EXAMPLE, tmp_path, Progress())
    assert path.read_bytes() == whole


def test_rows_of_other_numbers_are_not_mixed(tmp_path, monkeypatch):
    """Half a record by yesterday's estimator, half by today's, under one verdict."""
    example = dataclasses.replace(EXAMPLE, parts=("gnb",))
    with pytest.raises(Stopped):
        runner.run(example, tmp_path, StopAt(2))
    before = (tmp_path / "squares" / "records.jsonl").read_bytes()
    monkeypatch.setitem(numerics.VERSIONS, "gnb", numerics.VERSIONS["gnb"] + 1)
    with pytest.raises(LabError, match=r"other numbers .*gnb 3, today 4.*--out"):
        runner.run(example, tmp_path, Progress())
    assert (tmp_path / "squares" / "records.jsonl").read_bytes() == before


def test_a_record_of_other_numbers_says_so(tmp_path, monkeypatch, capsys):
    """A verdict about code that is gone, read as one about today's."""
    example = dataclasses.replace(EXAMPLE, claims=(1,), parts=("gnb", "paper"))
    records = runner.run(example, tmp_path, Progress())
    assert not notice(example, records)
    monkeypatch.setitem(numerics.VERSIONS, "gnb", 4)
    assert "gnb 3, today 4" in notice(example, records)
    assert "gnb 3, today 4" in page([example], tmp_path, link=".")
    about = records.about
    for environment in about["environments"]:
        del environment["numerics"]  # as before they were noted
    (tmp_path / "squares" / "about.json").write_text(json.dumps(about))
    assert "(gnb unknown, today 4)" in notice(example, records)
    monkeypatch.setattr(experiments, "find", lambda name: example)
    cli.main(["experiment", "squares", "--redraw", "--out", str(tmp_path)])
    assert "gnb unknown, today 4" in " ".join(capsys.readouterr().out.split())


def test_a_finished_run_is_left_alone(tmp_path):
    """A record that claims another commit made it, because somebody drew it again."""
    runner.run(EXAMPLE, tmp_path, Progress())
    about = tmp_path / "squares" / "about.json"
    content = json.loads(about.read_text())
    content["environments"][0]["commit"] = "another"
    about.write_text(json.dumps(content))
    runner.run(EXAMPLE, tmp_path, Progress())
    assert json.loads(about.read_text()) == content


def test_rows_of_two_versions_are_not_mixed(tmp_path):
    """A verdict from rows that mean different things."""
    runner.run(EXAMPLE, tmp_path, Progress())
    with pytest.raises(LabError, match="holds records of squares, version 1; rows of squares, version 2,"):
        runner.run(dataclasses.replace(EXAMPLE, version=2), tmp_path, Progress())


def test_quick_rows_lie_apart(tmp_path):
    """A run of seconds that passes for the full one."""
    runner.run(EXAMPLE, tmp_path, Progress(), quick=True)
    assert not Records(tmp_path / "squares").rows
    assert len(Records(tmp_path / "quick" / "squares").rows) == 3


def test_a_case_is_recorded_once_and_numbers_that_json_does_not_know_become_null(tmp_path):
    """Two results for one case; a file that other programs cannot read."""
    records = runner.run(EXAMPLE, tmp_path, Progress())
    with pytest.raises(ValueError, match="has a row already"):
        records.add({"x": 1}, square=2)
    assert records.where(x=1)[0].result == {"square": 1, "nothing": None}
    assert records.values("x") == [0, 1, 2, 3, 4]


def test_nothing_to_draw_is_said(tmp_path):
    """A traceback from matplotlib where there is no record."""
    with pytest.raises(UsageError, match="holds no records of squares"):
        runner.draw(EXAMPLE, Records(tmp_path / "squares"))


def test_a_verdict_is_one_of_four_and_a_sentence():
    """A table of claims with words of its own."""
    with pytest.raises(ValueError, match="write one of holds, holds in part, not seen at this scale"):
        Verdict("proven", "Yes.")
    with pytest.raises(ValueError, match="end it with a full stop"):
        Verdict("holds", "yes")


def test_a_misspelt_name_is_answered_with_the_list():
    """A module that cannot be imported, as a traceback."""
    with pytest.raises(UsageError, match="Choose from: toy-landscape"):
        experiments.find("toy")


@pytest.mark.parametrize("name", experiments.NAMES)
def test_every_experiment_runs_draws_and_judges(name, tmp_path, capsys):
    """An experiment that cannot be run by one command, or whose picture needs more than its records."""
    experiment = experiments.find(name)
    assert experiment.name == name
    for module, extra in experiment.needs.items():
        pytest.importorskip(module, reason=f"{name} needs {module}: pip install 'torch-sophia[{extra}]'")
    for field in WORDS:
        assert getattr(experiment, field).strip(), f"{name} does not say its {field}"
    assert all(1 <= number <= 8 for number in experiment.claims)
    command = ["experiment", name, "--quick", "--out", str(tmp_path)]
    cli.main(command)
    assert "Verdict:" in capsys.readouterr().out
    folder = tmp_path / "quick" / name
    records, picture = (folder / "records.jsonl").read_bytes(), (folder / "figure.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    (folder / "figure.png").unlink()
    cli.main([*command, "--redraw"])
    assert (folder / "figure.png").read_bytes() == picture
    cli.main(command)
    assert (folder / "records.jsonl").read_bytes() == records


def test_the_list_names_every_experiment(capsys):
    """Nobody would find them."""
    cli.main(["experiment"])
    out = capsys.readouterr().out
    assert all(name in out for name in experiments.NAMES)
