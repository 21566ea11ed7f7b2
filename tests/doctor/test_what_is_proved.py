"""What a refresh has found, proved and assumed, as `sophia doctor --model` shows it."""

import pytest
import subjects
from torch import nn
from torch.nn import functional as F

from sophia import Sophia
from sophia.doctor.findings import as_text
from sophia.doctor.given_model import subject_named
from sophia.doctor.trial_steps import check_training


def shown(name, **settings):
    """The findings for a function of `subjects.py`."""
    make = (lambda model: Sophia(model, lr=1e-2, **settings)) if settings else None
    return check_training(subject_named(f"subjects:{name}"), make, steps=12, lr=1e-2)


def data(findings, topic):
    return [f.data for f in findings if f.topic == topic]


READ = [
    # function, least and most weight, their sum, words
    ("plain", 1 / 16, 1 / 16, 1.0, "each prediction weighs 1 / 16, as in a mean (read"),
    ("summed", 1.0, 1.0, 16.0, "each prediction weighs 1, as in a sum, and all of them 16 (read"),
    ("half", 1 / 32, 1 / 32, 0.5, "weighs 0.0312, 0.5 times what it would in a mean over these (read"),
    ("weighted", 1 / 52, 5 / 52, 1.0, "predictions weigh from 0.0192 to 0.0962, all of them 1 (read"),
    ("two_batches", 1 / 16, 1 / 16, 1.0, "each prediction weighs 1 / 16, as in a mean (read"),
    ("gpt2", 1 / 72, 1 / 72, 1.0, "each prediction weighs 1 / 72, as in a mean (read"),
]


@pytest.mark.parametrize(("name", "least", "most", "total", "words"), READ, ids=[r[0] for r in READ])
def test_weights_and_fit(name, least, most, total, words):
    """A user who cannot see whether his sum, factor or weights of classes were understood."""
    findings = shown(name)
    fit, weights = data(findings, "loss")
    assert (fit["likelihood"], fit["fit"]) == ("Categorical", 1.0)
    assert weights["read"]
    assert [weights["least"], weights["most"], weights["sum"]] == pytest.approx(
        [least, most, total], rel=1e-2
    )
    assert words in " ".join(as_text(findings).split())
    assert not [f.text for f in findings if f.status == "wrong"]


ROWS = [
    # function, what, dimension, number, taken, share, words
    ("plain", "rows", 0, 16, 2, 1 / 8, "the rows are independent, as a run has shown: 16 of them"),
    ("batch_norm", "rows", 0, 0, 0, 1.0, "the rows are not independent (their outputs alone differ by"),
    ("time_first", "rows", 1, 16, 2, 1 / 8, "along dimension 1 of the outputs. A refresh runs 2, 0.125 of"),
    ("packed", "documents", 1, 8, 1, None, "the documents are independent, as a run has shown: 8 of them"),
    ("one_row", "tokens", 0, 0, 0, 1.0, "the tokens are not independent"),
    ("chunks", "rows", 0, 8, 1, 1 / 8, "A refresh runs 1, 0.125 of the predictions"),
    ("two_batches", "rows", 0, 0, 0, 1 / 2, "a refresh runs 1 of 2 micro-batches, 0.5 of"),
    ("gpt2", "rows", 0, 8, 1, 1 / 8, "the rows are independent"),
]


@pytest.mark.parametrize(
    ("name", "what", "dim", "number", "taken", "share", "words"), ROWS, ids=[r[0] for r in ROWS]
)
def test_rows_and_share(name, what, dim, number, taken, share, words):
    """A refresh that costs a whole step, or takes time steps for rows, and nobody sees it."""
    findings = shown(name)
    (rows,) = data(findings, "rows")
    assert (rows["what"], rows["dim"], rows["number"], rows["taken"]) == (what, dim, number, taken)
    assert share is None or rows["share"] == pytest.approx(share)
    assert words in " ".join(as_text(findings).split())
    # What it costs is said, and is nothing wrong: h is right.
    assert not [f.text for f in findings if f.status == "wrong"]
    said = [f for f in findings if f.text.startswith("Sophia warns")]
    assert [f.status for f in said] == ["note"] * (name in ("batch_norm", "one_row"))


def test_the_whole_is_run_where_it_was_asked_for():
    """A reason that is not the user's own."""
    (rows,) = data(shown("plain", fraction=1.0), "rows")
    assert (rows["number"], rows["share"], rows["whole"]) == (0, 1.0, "fraction=1.0 says so")


def test_outputs_that_join():
    """Chunks or heads that the loss uses, of which the report knows one."""
    findings = shown("chunks")
    outputs = data(findings, "outputs")
    assert [(o["counted"], o["joined"]) for o in outputs] == [(16, False), (16, True), (16, True)]
    _, weights = data(findings, "loss")
    assert [weights["least"], weights["most"], weights["sum"]] == pytest.approx([1 / 48, 1 / 48, 1.0])
    # Of different weights each has a line.
    _, *weights = data(shown("two_heads"), "loss")
    assert [w["sum"] for w in weights] == pytest.approx([1.0, 0.4], rel=1e-3)


@pytest.mark.parametrize("name", ["plain", "batch_norm", "gpt2"])
def test_repetition_is_proved(name):
    """Dropout or moving statistics, for which a user has to take it on trust."""
    (found,) = data(shown(name), "repetition")
    assert (found["proved"], found["differences"], found["unproved"], found["written"]) == (1, (), "", 0)


def test_a_forward_that_is_another_function():
    """A model that depends on a global, called sound."""
    findings = shown("counting")
    assert "run again, a forward is another function: its outputs differ by" in " ".join(
        f.text for f in findings if f.status == "wrong"
    )


def test_what_is_no_such_loss():
    """A figure that says how far off it is, beside the warning in full."""
    findings = shown("tempered")
    fit, weights = data(findings, "loss")
    assert fit["fit"] < 0.9
    assert not weights["read"]
    (said,) = [f.text for f in findings if f.status == "wrong"]
    assert said.startswith("Sophia warns: the gradient of your loss in the output of Sequential is not that")
    assert said.endswith("Until then h is made as if it were that of a mean")


def test_what_is_refused_is_shown_with_what_was_found():
    """An error of the first step alone, of which nobody sees what it is about."""
    findings = shown("two_kinds")
    assert [o["counted"] for o in data(findings, "outputs")] == [16]
    (refused,) = [f.text for f in findings if f.status == "wrong"]
    assert 'likelihood=Heads({"logits": Categorical(), "value": Gaussian()})' in refused
    assert refused.endswith("which leaves it out of h")


def test_a_squared_error_is_assumed_to_be_a_mean():
    """An assumption that looks like a measurement."""
    findings = shown("numbers", likelihood="gaussian")
    fit, weights = data(findings, "loss")
    assert (fit["likelihood"], fit["fit"], weights["read"]) == ("Gaussian", None, False)
    assert "a mean is assumed, in which each weighs 1 / B" in as_text(findings)


def test_without_a_likelihood():
    """Weights, shown for an estimator that does not read any."""
    (found,) = [f.text for f in shown("gpt2", estimator="hutchinson") if f.topic == "loss"]
    assert found == "no likelihood is needed: this estimator takes the loss as the model returns it"


def test_the_scale_of_the_gradient():
    """A clip that makes gamma another one."""
    (found,) = data(shown("plain"), "gradient")
    assert found["gradient_scale"] == pytest.approx(1.0)
    findings = shown("clipped")
    (found,) = data(findings, "gradient")
    assert found["gradient_scale"] == pytest.approx(0.25)
    assert "gamma acts as 4 times itself" in " ".join(as_text(findings).split())


def test_no_account_is_made_unless_asked_for():
    """A report that every training pays for."""
    x, y = subjects.rows()
    model = nn.Linear(4, 5)
    opt = Sophia(model, update_every=1)
    for accounts in (None, []):
        opt._refresher.accounts = accounts
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    assert len(accounts) == 1
    assert accounts[0].rows.taken == 2
    assert accounts[0].share == 1 / 8
