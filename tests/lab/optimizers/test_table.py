"""The table of contenders: a file each, from copying the template to a search."""

import importlib
from pathlib import Path

import pytest
import torch

from sophia.lab import cli
from sophia.lab.config.protocol_parts import Search
from sophia.lab.config.run import Data
from sophia.lab.data import vocabulary
from sophia.lab.optimizers import _template, table
from sophia.lab.protocols import protocol_file
from sophia.lab.training.loop import train
from sophia.lab.training.workers import Events


@pytest.fixture
def hum(tmp_path, monkeypatch):
    """The template, copied and filled in as a newcomer would, and named in the table."""
    text = Path(_template.__file__).read_text()
    for old, new in (("Calm", "Hum"), ('name="calm"', 'name="hum"'), ("momentum over its", "hum, its")):
        assert old in text
        text = text.replace(old, new)
    folder = tmp_path / "made_up_contender"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "hum.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    file = importlib.import_module("made_up_contender.hum")
    monkeypatch.setattr(table, "CONTENDERS", table.by_name((*table.FILES, file)))
    return file.CONTENDER


def test_a_contender_in_one_file_is_listed_trained_and_searched(
    hum, tmp_path, text, ids, capsys, monkeypatch
):
    """Else a newcomer would have to know other places than the file and its line in the table."""
    pytest.importorskip("optuna")
    from sophia.lab.jobs import search

    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["contenders"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("hum "))
    assert line.split()[-3:] == ["1", "4", "4"]

    protocol = protocol_file.chosen("tiny", None).with_contenders(["hum"])
    data = Data(text.name, text.sha256, vocabulary.SHA256)
    run = protocol.run("hum", data=data, seed=1, steps=24)
    assert table.of(run.optimizer) is hum
    result = train(run, tmp_path / "runs", ids)
    assert result["loss"] < 8.0, "that is where it starts"

    def here(configs, runs, **options):
        for config in configs:
            train(config, runs, ids)

    monkeypatch.setattr(search, "execute", here)  # no processes: they would not know the made-up file
    trials = search.search(
        {"hum": protocol.space("hum")},
        lambda label, point: protocol.trial(label, point, data=data),
        Search(trials=2, spread=1, seed=5),
        tmp_path / "search",
        workers=1,
        events=Events(),
    )
    assert [set(trial.point) for trial in trials] == [set(hum.space)] * 2
    assert all(trial.loss is not None for trial in trials)


def test_every_file_of_a_contender_is_in_the_table():
    """Else a finished contender could lie in the folder and nobody could name it."""
    folder = Path(table.__file__).parent
    holds = {
        path.stem
        for path in folder.glob("*.py")
        if any(line.startswith(("CONTENDER =", "CONTENDERS =")) for line in path.read_text().splitlines())
    }
    assert holds == {file.__name__.rpartition(".")[2] for file in table.FILES} | {"_template"}
    rows = sum(len(getattr(file, "CONTENDERS", ("one",))) for file in table.FILES)
    assert len(table.CONTENDERS) == rows, "two contenders have one name"


def test_the_template_takes_the_step_that_it_says():
    """Else a newcomer would start from a broken example."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = _template.Calm([p], lr=0.1, beta=0.0, weight_decay=0.5)
    p.grad = torch.tensor([3.0, -4.0])  # rms sqrt(12.5)
    optimizer.step()
    expected = torch.tensor([0.95, 1.9]) - 0.1 * torch.tensor([3.0, -4.0]) / 12.5**0.5
    torch.testing.assert_close(p.detach(), expected)
