"""``sophia bench``: what it times, what it says of the rest, and the rule that it has written again."""

import json
from pathlib import Path

import pytest
import torch

from sophia.lab.bench import measure, memory, methods, results_table, timing
from sophia.lab.bench import problem as subject
from sophia.lab.bench.official_rule import OfficialRule
from sophia.lab.cli import main
from sophia.lab.support.errors import LabError, UsageError
from sophia.update_rule import sophia_step


def test_the_official_rule_is_the_rule_with_the_count_at_the_step():
    """A slip in the yardstick would be timed, and shown, as the official code's."""
    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.randn(40, dtype=torch.float64))
    opt = OfficialRule([theta], lr=0.1, betas=(0.9, 0.8), rho=0.05, weight_decay=0.3)
    ours, m, h = theta.detach().clone(), torch.zeros(40).double(), torch.zeros(40).double()
    for step in range(5):
        theta.grad = torch.randn(40, dtype=torch.float64)
        ours, m = sophia_step(
            ours, theta.grad, m, h, lr=0.1, beta1=0.9, gamma=0.05, eps=1e-15, weight_decay=0.3
        )
        opt.step(bs=7)
        torch.testing.assert_close(theta.detach(), ours)
        theta.grad = torch.randn(40, dtype=torch.float64) * 10.0**-step
        h = 0.8 * h + 0.2 * 7 * theta.grad**2
        opt.update_hessian()


def test_a_record_has_every_method_or_why_not(monkeypatch):
    """Where a peer is not installed, or fails on the user's model, the others must be measured."""

    def failing(problem):
        raise ValueError("no such layer")

    rows = {
        **methods.METHODS,
        "absent": methods.Method(lambda problem: None, package="no-such-package-anywhere"),
        "failing": methods.Method(failing),
    }
    monkeypatch.setattr(measure, "METHODS", rows)
    names = ("sophia", "sophia, bfloat16 state", "official rule", "torch Adafactor", "absent", "failing")
    record = json.loads(json.dumps(measure.measure("tiny", names=names, rounds=1, with_memory=False)))
    assert list(record["rows"]) == [name for name in rows if name in (methods.REFERENCE, *names)]
    assert record["rows"]["absent"] == {"missing": "not installed: pip install no-such-package-anywhere"}
    assert "no such layer" in record["rows"]["failing"]["missing"]
    state = {name: row["state_bytes"] for name, row in record["rows"].items() if "state_bytes" in row}
    assert (state["sophia"], state["sophia, bfloat16 state"], state["official rule"]) == (8, 4, 8)
    for name in ("sophia", "official rule"):
        row = record["rows"][name]
        assert row["refreshing_step"]["median"] > row["training_step"]["median"]
        assert row["refresh"] > 0
    assert "refresh" not in record["rows"]["torch Adafactor"]
    printed = results_table.table(record)
    assert printed.row_count == len(names) - 1
    assert "absent: not installed" in printed.caption


def test_our_own_failure_is_not_hidden(monkeypatch):
    """A Sophia that fails on the user's model would look like one more package that is not there."""

    def failing(problem):
        raise ValueError("ours")

    monkeypatch.setattr(measure, "METHODS", {**methods.METHODS, "sophia": methods.Method(failing)})
    with pytest.raises(ValueError, match="ours"):
        measure.measure("tiny", names=("sophia",), rounds=1, with_memory=False)


def test_a_refresh_is_due_on_every_second_step_and_on_none_of_the_steps_alone():
    """A refresh among the steps that are timed alone would be taken for the cost of a step."""
    trainer = methods.METHODS["sophia"].make(subject.make("tiny"))
    for number in range(4):
        trainer.step()
        assert trainer.optimizer.stats()["refreshes"] == number // 2 + 1
    trainer.ready_for_steps_alone()
    for _ in range(3):
        trainer.step_alone()
    assert trainer.optimizer.stats()["refreshes"] == 2


def test_ratios_are_over_the_mean_of_both_neighbours():
    """A machine that slows down in the middle would make the method look slow."""
    now = [0.0]

    class Fake:
        refreshes = False

        def __init__(self, costs):
            self.costs = iter(costs)

        def step(self):
            now[0] += next(self.costs)

    # The machine gets slower by a tenth with every step; the method costs twice what the reference does.
    own, reference = Fake([1, 1, 2 * 1.1, 2 * 1.3]), Fake([1, 1.0, 1.2, 1.4])
    timed = timing.training_steps(own, reference, rounds=2, clock=lambda: now[0])
    assert timed.plain.median == pytest.approx(2.0)
    assert timed.refreshing is None


def small():
    """What a user's module may hold."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
    ids = torch.arange(6).view(2, 3)

    def loss_of(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    return model, (ids,), loss_of


WRONG = {
    "unknown shape": ("huge", UsageError, "no model 'huge'"),
    "unknown module": ("no_such_module:make", UsageError, "no_such_module"),
    "not a function": ("math:pi", UsageError, "float, not a class"),
    "not a model": ("builtins:list", UsageError, "returned list: sophia bench needs what to train"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_is_refused(case):
    """Anything else fails later, in somebody else's words."""
    what, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        subject.make(what)


def test_a_model_of_ones_own(monkeypatch):
    """The built-in model says nothing about the user's."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    record = measure.measure("test_bench:small", names=("sophia",), rounds=1, with_memory=False)
    assert record["parameters"] == 7 * 4 + 4 * 7 + 7
    assert record["shape"] is None


def test_unknown_method_and_missing_gpu(monkeypatch):
    """A typing error would be timed as nothing."""
    with pytest.raises(UsageError, match="There is no method 'sofia'"):
        measure.measure("tiny", names=("sofia",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LabError, match="no GPU"):
        measure.measure("tiny", device="cuda")


def test_peak_memory_is_that_of_another_process():
    """In this one it would be the peak of the whole test run."""
    peak = memory.peak_bytes("tiny", "sophia", threads=1, device="cpu")
    assert peak is None or 0 < peak < 2**30


def test_the_command(tmp_path, capsys):
    """What a user types: a table, a record, a picture that the record alone decides."""
    record, picture = tmp_path / "made" / "r.json", tmp_path / "p.png"
    command = ["bench", "sophia", "--quick", "--json", str(record), "--picture", str(picture)]
    main(command)
    assert "sophia" in capsys.readouterr().out
    again = tmp_path / "again.png"
    results_table.save(json.loads(record.read_text()), again)
    assert again.read_bytes() == picture.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--quick", "--picture", str(tmp_path / "p.pdf")])
