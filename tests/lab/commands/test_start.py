"""What does not need torch does not wait for it."""

import subprocess
import sys

import pytest

import sophia

SAYS = """
import sys
try:
    from sophia.lab.cli import main
    main({arguments!r})
except SystemExit:
    pass
print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["compare", "--help"],
        ["pretrain", "--help"],
        ["sweep", "--no-such-option"],
        ["no-such-command"],
        ["doctor", "--help"],
        ["doctor", "--no-such-option"],
    ],
    ids=" ".join,
)
def test_help_and_wrong_options_do_not_load_torch(arguments):
    """Two seconds for a word of help."""
    code = SAYS.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_the_package_has_its_names_all_the_same():
    """A name that is found at its first use, and one that is not there."""
    assert set(sophia.__all__) <= set(dir(sophia))
    for name in sophia.__all__:
        assert getattr(sophia, name) is not None
    assert sophia.Sophia.__module__ == "sophia.optimizer"
    assert sophia.update_rule.polar is not None
    with pytest.raises(AttributeError, match="module 'sophia' has no attribute 'sofia'"):
        _ = sophia.sofia
    with pytest.raises(ImportError):
        from sophia import nothing  # noqa: F401


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["compare", "--help"], ["contenders"], ["--version"], ["doctor"]], ids=" ".join
)
def test_a_reader_that_has_gone_ends_it_without_a_traceback(arguments):
    """``sophia compare --help | head -3``."""
    code = f"from sophia.lab.cli import main; main({arguments!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        started.stdout.close()
        assert not started.stderr.read()
    assert started.returncode in (1, 141)  # rich's own, and ours
