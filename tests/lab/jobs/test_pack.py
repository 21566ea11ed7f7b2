import fcntl
import itertools
import json
import os
import shutil

import pytest
from synthetic import Planted, write_comparison

from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.jobs.pack import pack, unpack
from sophia.lab.records.pack_file import NAME
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.training import checkpoint

SMALL = Planted(seeds=(1,), budgets=(30, 60))


def bytes_of(folder):
    """Everything in a folder but locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


@pytest.fixture
def folder(tmp_path):
    return write_comparison(tmp_path / "c", SMALL)


def test_packed_and_unpacked_again_it_is_what_it_was(folder):
    """A record that its pack changes."""
    before = bytes_of(folder)
    done = pack(folder)
    assert (done.runs, done.moved) == (4, 4)
    assert done.size == (folder / NAME).stat().st_size
    assert set(bytes_of(folder)) == {"comparison.json", NAME}
    assert not (folder / "runs").exists()
    packed = bytes_of(folder)
    again = unpack(folder)
    assert (again.runs, again.moved) == (4, 4)
    assert bytes_of(folder) == before
    pack(folder)
    assert bytes_of(folder) == packed


def test_a_second_time_nothing_happens(folder):
    """A file that gets a new date, or a command that fails, because it was given twice."""
    pack(folder)
    before = (folder / NAME).stat().st_mtime_ns
    done = pack(folder)
    assert (done.runs, done.moved) == (4, 0)
    assert (folder / NAME).stat().st_mtime_ns == before
    unpack(folder)
    assert (unpack(folder).runs, unpack(folder).moved) == (4, 0)


def test_new_runs_come_to_those_that_are_packed(folder, tmp_path):
    """A pack that forgets what it held."""
    later = tmp_path / "later"
    shutil.copytree(folder, later)
    last = sorted((later / "runs").iterdir())[0]
    kept = tmp_path / last.name
    shutil.move(last, kept)
    pack(later)
    (later / "runs").mkdir()
    shutil.move(kept, later / "runs" / last.name)
    done = pack(later)
    assert (done.runs, done.moved) == (4, 1)
    pack(folder)
    assert bytes_of(later) == bytes_of(folder)  # the order in which runs came does not show


def first(folder):
    return sorted((folder / "runs").iterdir())[0]


def append(file, text):
    file.write_text(file.read_text() + text)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "result.json").unlink(), "has no result.json, so the run has not ended"),
        (lambda run: (run / "attempts.jsonl").unlink(), "has no attempts.jsonl, so the run is damaged"),
        (lambda run: append(run / "log.jsonl", '{"st'), "log.jsonl, line"),
        (lambda run: (run / "config.json").write_text("{}"), "config.json is not written as the lab writes"),
        (
            lambda run: (run / "notes.txt").write_text("mine"),
            "holds notes.txt, which a pack has no place for",
        ),
        (lambda run: (run / "shards-5").mkdir(), "holds shards-5, which is no plain file"),
        (lambda run: (run / "x.sent").symlink_to("nowhere"), "holds x.sent, which is no plain file"),
        (lambda run: (run.parent / "a note").write_text("mine"), "is no folder of a run"),
        (lambda run: (run.parent / "a folder").mkdir(), "may lead out of its folder"),
        (lambda run: (run.parent / "link").symlink_to(run), "is a link"),
        (lambda run: checkpoint.save(run, {"step": 30}), "keeps the trained weights (of step 30)"),
    ],
)
def test_what_cannot_be_packed_is_named_and_nothing_changes(folder, damage, words):
    """A run that is lost because it was not what was expected."""
    damage(first(folder) if words[:5] != "keeps" else with_steps(folder, 30))
    before = bytes_of(folder)
    with pytest.raises(LabError) as error:
        pack(folder)
    assert words in str(error.value)
    assert "1 of its runs cannot be packed" in str(error.value)
    assert bytes_of(folder) == before


def with_steps(folder, steps):
    return next(
        run
        for run in (folder / "runs").iterdir()
        if json.loads((run / "result.json").read_text())["steps"] == steps
    )


def test_what_served_for_resuming_is_not_kept(folder):
    """A comparison that was once stopped, and can never be packed."""
    before = bytes_of(folder)
    run = with_steps(folder, 60)
    checkpoint.save(run, {"step": 30})
    (run / "lock").touch()
    (run / "tracker-x.sent").touch()
    pack(folder)
    unpack(folder)
    assert bytes_of(folder) == before


@pytest.mark.parametrize("place", ["", "runs/{run}"])
def test_a_folder_that_is_being_written_is_refused(folder, place):
    """A run that ends while its folder is removed."""
    held = folder / place.format(run=first(folder).name)
    with (held / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LabError, match="Another process is writing"):
            pack(folder)
    assert len(list((folder / "runs").iterdir())) == 4
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("job", [pack, unpack])
def test_a_folder_without_runs_is_refused(tmp_path, job):
    """A mistyped path that looks like success."""
    with pytest.raises(UsageError, match="Give the folder"):
        job(tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        job(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 5 of runs.jsonl was left out: it is not JSON"),
        ('{"run": "a", "config": {}, "result": [], "attempts": [], "log": {}}', "run a: its log"),
        (
            '{"run": "a", "config": {}, "result": {}, "attempts": 3, "log": {"order": [], "tables": []}}',
            "run a: its attempts are no list",
        ),
        (
            '{"run": "a", "config": {}, "result": [], "attempts": [], "log": {"order": [], "tables": []}}',
            "run a: result.json holds no JSON object",
        ),
        (
            '{"run": "a", "config": {"x": NaN}, "result": {}, "attempts": [], '
            '"log": {"order": [], "tables": []}}',
            "run a: one of its files holds NaN",
        ),
    ],
)
def test_a_damaged_pack_is_neither_merged_nor_unpacked(folder, line, words):
    """What can still be read of a damaged pack, thrown away with the rest."""
    pack(folder)
    with (folder / NAME).open("a") as file:
        file.write(f"{line}\n")
    before = bytes_of(folder)
    for job in (pack, unpack):
        with pytest.raises(LabError) as error:
            job(folder)
        assert words in str(error.value).replace("it has no order and tables", "its log")
        assert bytes_of(folder) == before


def test_another_run_under_the_same_name_is_refused(folder, tmp_path):
    """One of two results that is overwritten by the other."""
    shutil.copytree(folder, tmp_path / "other")
    pack(folder)
    shutil.copytree(tmp_path / "other" / "runs", folder / "runs")
    append(first(folder) / "result.json", "\n")
    before = bytes_of(folder)
    for job in (pack, unpack):
        with pytest.raises(LabError, match=r"holds another result\.json than runs\.jsonl does"):
            job(folder)
        assert bytes_of(folder) == before


@pytest.mark.parametrize("job", [pack, unpack])
def test_nothing_behind_a_link_is_touched(folder, tmp_path, job):
    """A folder from somebody else that makes this command write or delete elsewhere."""
    if job is unpack:
        pack(folder)
        (folder / "runs").mkdir()
        (tmp_path / "other").mkdir()
        name = json.loads((folder / NAME).read_text().splitlines()[0])["run"]
        (folder / "runs" / name).symlink_to(tmp_path / "other")
        with pytest.raises(LabError, match="is no plain folder"):
            unpack(folder)
        assert not list((tmp_path / "other").iterdir())
        shutil.rmtree(folder / "runs")
    else:
        shutil.move(folder / "runs", tmp_path / "other")
    (folder / "runs").symlink_to(tmp_path / "other")
    before = bytes_of(tmp_path / "other")
    with pytest.raises(UsageError, match="is a link"):
        job(folder)
    assert bytes_of(tmp_path / "other") == before


@pytest.mark.parametrize("job", [pack, unpack])
def test_a_kill_between_any_two_steps_loses_nothing(tmp_path, monkeypatch, job):
    """A record that a crash at the wrong moment takes away, or leaves in halves."""
    whole = write_comparison(tmp_path / "whole", SMALL)
    unpacked, runs = bytes_of(whole), read_evidence(whole).runs
    pack(whole)
    packed = bytes_of(whole)
    if job is pack:
        unpack(whole)
    for step in itertools.count():
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(whole, folder)
        left = [step]
        with monkeypatch.context() as patch:

            def dying(function, left=left):
                def call(*arguments, **options):
                    left[0] -= 1
                    if left[0] < 0:  # and after that nothing happens any more
                        raise KeyboardInterrupt
                    return function(*arguments, **options)

                return call

            for name in ("replace", "unlink", "rmdir", "fsync"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                job(folder)
            except KeyboardInterrupt:
                killed = True
            else:
                killed = False
        evidence = read_evidence(folder)
        assert not evidence.problems
        assert evidence.runs == runs
        shutil.copytree(folder, tmp_path / f"back-{step}")
        pack(folder)  # both ways lead on from here
        assert bytes_of(folder) == packed
        unpack(tmp_path / f"back-{step}")
        if killed:
            back = bytes_of(tmp_path / f"back-{step}")
            assert {k: v for k, v in back.items() if not k.endswith(".tmp")} == unpacked
        else:
            break
    assert step > 20


def test_a_pack_that_does_not_read_back_removes_nothing(folder, monkeypatch):
    """A disk that does not keep what it was given."""
    before = bytes_of(folder)
    replace = os.replace

    def spoil(source, target):
        replace(source, target)
        if str(target).endswith(NAME):
            lines = target.read_text().splitlines(keepends=True)
            target.write_text("".join(lines[:-1]))

    monkeypatch.setattr(os, "replace", spoil)
    with pytest.raises(LabError, match="does not read back as it was written"):
        pack(folder)
    monkeypatch.undo()
    after = bytes_of(folder)
    del after[NAME]
    assert after == before
    pack(folder)
    unpack(folder)
    assert bytes_of(folder) == before
