import json
import shutil

import pytest

from sophia.lab import cli
from sophia.lab.records.pack_file import NAME

SHORT = ["--preset", "tiny", "--seeds", "1", "--workers", "1"]


def bytes_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(text_file, tmp_path_factory):
    """A comparison that has ended, in folders, and the command that makes it."""
    folder = tmp_path_factory.mktemp("made") / "c"
    cli.main(command(text_file, folder))
    return folder


def command(text_file, folder):
    return ["compare", *SHORT, "--data", str(text_file), "--out", str(folder)]


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "c")


def test_a_packed_comparison_has_ended(folder, text_file, capsys):
    """A command that trains again what is in the pack, or leaves folders of nothing."""
    cli.main(["pack", str(folder)])
    assert "4 runs packed, 4 in runs.jsonl" in capsys.readouterr().out
    packed = (folder / NAME).read_bytes()
    for more in ([], ["--resume"]):
        cli.main([*command(text_file, folder), *more])
        assert f"All 4 runs of {folder} have ended before." in capsys.readouterr().out.replace("\n", "")
        assert (folder / NAME).read_bytes() == packed
        assert not (folder / "runs").exists()
    cli.main(["pack", str(folder)])
    assert "its 4 runs are packed" in capsys.readouterr().out
    cli.main(["pack", "--unpack", str(folder)])
    assert "4 runs unpacked" in capsys.readouterr().out
    cli.main(["pack", "--unpack", str(folder)])
    assert "its 4 runs are in folders" in capsys.readouterr().out


def test_what_is_missing_in_a_pack_becomes_a_folder_and_comes_to_the_pack(folder, text_file, capsys):
    """A comparison that was packed on its way and cannot go on, or goes on from nothing."""
    cli.main(["pack", str(folder)])
    first, *rest = (folder / NAME).read_text().splitlines(keepends=True)
    (folder / NAME).write_text("".join(rest))
    capsys.readouterr()
    cli.main(command(text_file, folder))
    assert "Going on: 3 of 4 runs have ended before." in " ".join(capsys.readouterr().out.split())
    (new,) = (folder / "runs").iterdir()
    assert new.name == json.loads(first)["run"]
    assert json.loads((new / "result.json").read_text())["loss"] == json.loads(first)["result"]["loss"]
    assert (folder / NAME).read_text() == "".join(rest)
    cli.main(["pack", str(folder)])
    assert "1 runs packed, 4 in runs.jsonl" in capsys.readouterr().out
    assert not (folder / "runs").exists()
    runs = [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
    assert [run["run"] for run in runs] == sorted(run["run"] for run in runs)
    assert runs[0]["config"] == json.loads(first)["config"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"result"', '"resolt"', "line 1 of runs.jsonl was left out"),
        ('"steps": 20', '"steps": 21', "has another configuration than its name says"),
        ('"order": [0', '"order": [7', "a table that is not there"),
    ],
)
def test_with_a_damaged_pack_nothing_is_trained(folder, text_file, capsys, old, new, words):
    """A run that is trained again, to another end, because its line could not be read."""
    cli.main(["pack", str(folder)])
    text = (folder / NAME).read_text()
    assert old in text
    lines = text.splitlines(keepends=True)
    (place,) = [i for i, line in enumerate(lines) if old in line][:1]
    lines.insert(0, lines.pop(place).replace(old, new))
    (folder / NAME).write_text("".join(lines))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(command(text_file, folder))
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Restore the file" in said
    assert not (folder / "runs").exists()


def test_a_single_run_that_was_packed_has_ended(text_file, tmp_path, capsys):
    """`sophia train` that begins a packed run anew."""
    train = ["train", "--preset", "tiny", "--data", str(text_file), "--out", str(tmp_path / "runs")]
    train += ["--steps", "10"]
    cli.main([*train, "--contender", "adamw"])
    first = capsys.readouterr().out.splitlines()[-1]
    cli.main(["pack", str(tmp_path)])
    before = bytes_of(tmp_path)
    for more in ([], ["--resume"]):
        cli.main([*train, "--contender", "adamw", *more])
        said = capsys.readouterr().out
        assert first.split("Records:")[0] in said
    assert bytes_of(tmp_path) == before
    cli.main([*train, "--contender", "lion"])
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_without_a_folder_it_says_what_to_write(capsys):
    """A command that does nothing and says nothing."""
    with pytest.raises(SystemExit) as end:
        cli.main(["pack"])
    assert end.value.code == 2
    assert "Write: sophia pack comparisons/NAME" in capsys.readouterr().err
