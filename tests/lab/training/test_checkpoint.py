import errno
import hashlib
import io
import os
import random
import warnings

import pytest
import torch

from sophia.lab.support import files
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.training import checkpoint
from sophia.lab.training.checkpoint import DamagedCheckpoint

NEWEST, OLDER = "checkpoint.pt", "checkpoint-previous.pt"


@pytest.fixture
def two(tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step, "x": torch.full((100,), float(step))})
    return tmp_path


def test_the_newest_is_read_and_nothing_else_is_left(two):
    """Else a run would go on from an old state, or fill the disk."""
    assert checkpoint.load(two)["step"] == 2
    assert {p.name for p in two.iterdir()} == {NEWEST, OLDER}
    assert checkpoint.load(two / "other") is None


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "checksum": lambda data: data[:10] + bytes([data[10] ^ 1]) + data[11:],
    "a picture": lambda data: b"\x89PNG" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_previous_one_used(two, damage):
    """Else one flipped bit would cost a run, or change it silently."""
    newest = two / NEWEST
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(DamagedCheckpoint, match=r"checkpoint\.pt of the run .* is damaged"):
        assert checkpoint.load(two)["step"] == 1


def test_damage_of_both_is_an_error_that_says_what_to_do(two):
    """Else the run would silently begin again, over its own records."""
    for name in (NEWEST, OLDER):
        (two / name).write_bytes(b"")
    with pytest.raises(LabError, match="Delete the folder"):
        checkpoint.load(two)


def test_code_in_a_checkpoint_is_never_run(two, tmp_path):
    """Else a folder from somebody else could do anything on this machine."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    buffer = io.BytesIO()
    torch.save({"step": 3, "trap": Trap()}, buffer)
    payload = buffer.getvalue()
    (two / NEWEST).write_bytes(b"SOPHIA01" + hashlib.sha256(payload).digest() + payload)
    with pytest.warns(DamagedCheckpoint, match="torch refuses it"):
        assert checkpoint.load(two)["step"] == 1
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint(two, monkeypatch, call):
    """Else running out of space would cost the run."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, full)
        with pytest.raises(LabError, match="No space left"):
            checkpoint.save(two, {"step": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load(two)["step"] == 2
    assert {p.name for p in two.iterdir()} == {NEWEST, OLDER}


def test_a_crash_between_the_renames_leaves_a_readable_one(two, monkeypatch):
    """Else a power cut at the wrong moment would cost the run."""
    replace = os.replace

    def stop_at_the_last(source, target):
        if str(target).endswith("checkpoint.pt"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(two, {"step": 3})
    assert checkpoint.load(two)["step"] == 2


def test_random_states_come_back():
    """Else dropout and shuffles of a user's model would differ after a resume."""
    state = checkpoint.random_state()
    drawn = torch.rand(3), random.random()
    checkpoint.restore_random_state(state)
    assert torch.equal(torch.rand(3), drawn[0])
    assert random.random() == drawn[1]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0", "ä", "x" * 129, None, 3]
)
def test_names_that_are_paths_are_refused(name):
    """Else a record from somebody else could read or write outside its folder."""
    with pytest.raises(UsageError, match="may lead out"):
        files.checked_name(name)


def test_numbers_that_json_does_not_know_are_refused_not_written(tmp_path):
    """Else other programs could not read the records."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
