import shutil
from pathlib import Path

import pytest

from sophia.lab import experiments
from sophia.lab.experiments.framework import runner
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.jobs import evaluate
from sophia.lab.optimizers.table import CONTENDERS
from sophia.numerics import VERSIONS

RESULTS = Path(__file__).parents[3] / "results" / "experiments"


class Asked(Exception):
    """A case that would be run."""


@pytest.mark.skipif(not RESULTS.exists(), reason="the records are not in the source distribution")
@pytest.mark.parametrize("name", experiments.NAMES)
def test_an_experiment_says_whose_numbers_its_rows_hold(name):
    """A contender whose numbers change, in a record that does not say so."""
    experiment = experiments.find(name)
    used = {row.case.get("contender") for row in Records(RESULTS / name).rows}
    if name == "stability":
        used -= {"sophia-g"}  # its own: the ablated one, with labels drawn singly
    known = [row for row in CONTENDERS.values() if row.name in used]
    assert {part for row in known for part in row.parts} <= set(experiment.parts)
    assert set(experiment.parts) <= set(VERSIONS)


@pytest.mark.skipif(not RESULTS.exists(), reason="the records are not in the source distribution")
@pytest.mark.parametrize("name", experiments.NAMES)
def test_what_is_recorded_is_not_run_again(name, tmp_path, monkeypatch):
    """A command that trains for an hour what the record holds, and changes the record."""
    shutil.copytree(RESULTS / name, tmp_path / name)
    files = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    left = Records.left

    def refuse(self, cases, progress):
        for case in left(self, cases, progress):
            raise Asked(case)
        yield from ()

    def refuse_to_add(self, case, **result):
        raise Asked(case)

    monkeypatch.setattr(Records, "left", refuse)
    monkeypatch.setattr(Records, "add", refuse_to_add)
    monkeypatch.setattr(evaluate, "require", lambda what: None)
    monkeypatch.chdir(tmp_path)  # an experiment that reads other records of a clone has to have its rows too
    records = runner.run(experiments.find(name), tmp_path, Progress())
    assert records.finished
    assert {path: path.read_bytes() for path in files} == files
    assert {path.name for path in (tmp_path / name).rglob("*")} - {"lock"} <= {
        part for path in files for part in path.parts
    }
