"""Which recorded runs hold other numbers than today's, from what the records say."""

import pytest

from sophia.lab.analysis.made_by import notice, numbers, other_code, stale
from sophia.lab.analysis.read_records import Run

GNB = {"estimator": "gnb", "gamma": 0.1}


def run(contender="sophia-g", settings=GNB, **environment):
    return Run(
        contender, 1, 400, "0" * 12, "finished",
        {"status": "finished", "environment": environment},
        {"optimizer": {"contender": contender, "settings": settings}},
    )  # fmt: skip


OLD, NEW = "6c421e118502", "ec038a64f088"
TODAY = {"numerics": "gnb 3, paper 1"}
CASES = {
    "an old commit": (run(commit=OLD), {"gnb": 1, "paper": 1}, True),
    "a newer one": (run(commit=NEW), {"gnb": 2, "paper": 1}, True),
    "the newer one, edited": (run(commit=NEW + "+"), {"gnb": 2, "paper": 1}, True),
    "a commit of which nothing is known": (run(commit="abcdef0"), {"gnb": None, "paper": None}, True),
    "no commit": (run(), {"gnb": None, "paper": None}, True),
    "it says so itself": (run(commit=OLD, numerics="gnb 3, paper 1"), {"gnb": 3, "paper": 1}, False),
    "hutchinson": (run(settings={"estimator": "hutchinson"}), {"hutchinson": None, "paper": None}, True),
    "an own rule": (run(settings={"rule": "damped"}, commit=NEW), {"gnb": 2, "damped": 3}, True),
    "an own rule, before": (run(settings={"rule": "damped"}, commit=OLD), {"gnb": 1, "damped": 1}, True),
    "no part of Sophia": (run("adamw", {"lr": 1e-3}, commit=OLD), {}, False),
    "nonsense": (run(settings=[1], commit=5, numerics=7), {}, False),
    "nonsense in words": (run(numerics="gnb 9999999999999, x y, \u0968"), {}, False),
}  # fmt: skip


@pytest.mark.parametrize(("made", "versions", "old"), CASES.values(), ids=CASES)
def test_versions_are_read_off_a_record(made, versions, old):
    """Else a run would be called stale wrongly, or not where it is."""
    assert numbers(made) == versions
    assert stale(made) is old


def test_a_run_that_has_not_ended_was_made_by_nobody():
    """Else a planned run would count among those of other code."""
    assert not stale(Run("sophia-g", 1, 400, "", "missing"))
    assert other_code([Run("sophia-g", 1, 400, "", "missing"), run(**TODAY)]) == notice([]) == ""


def test_the_sentence_says_how_many_by_which_and_how():
    """Else nobody could tell what to make again."""
    damped = run("sophia-damped", {"rule": "damped"}, commit=OLD)
    assert other_code([run(commit=OLD), run(commit=OLD), run(**TODAY)]) == (
        "2 of 3 runs were made by other code (6c421e1, numerics gnb 1; today gnb 3)"
    )
    assert other_code([run(commit=OLD), damped, run(**TODAY), run()]) == (
        "3 of 4 runs were made by other code (1 of sophia-g: 6c421e1, numerics gnb 1; today gnb 3, and "
        "1 of sophia-damped: 6c421e1, numerics gnb 1, damped 1; today gnb 3, damped 3, and "
        "1 of sophia-g: commit unknown, numerics not recorded; today gnb 3)"
    )
    assert "What is said of sophia-g and sophia-damped is about that code" in notice([run(), damped])
    assert "<b>" not in other_code([run(commit="<b>"), run()])
