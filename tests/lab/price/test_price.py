"""`sophia plan`: hours and dollars, held to arithmetic done here by hand; and claims that stay claims."""

import json
import math

import pytest
import synthetic

from sophia.lab import cli
from sophia.lab.analysis.speedup import Ratio
from sophia.lab.price.bill import bill, break_even, sentence
from sophia.lab.price.find_inputs import examples, find_example, inputs_of
from sophia.lab.price.inputs import Number, Span
from sophia.lab.price.measured_speedup import _span, measured_gain
from sophia.lab.price.options import Asked
from sophia.lab.support.errors import UsageError


def priced(example=None, *, measured=(), **asked):
    inputs = inputs_of(Asked(**asked), example and find_example(example), measured=measured)
    return inputs, bill(inputs)


def test_the_bill_of_a_bare_size_is_six_flops_a_parameter_and_token():
    """Else every price would be off by a factor."""
    asked = {"tokens": "260B", "hardware": "h100", "utilisation": 0.5, "devices": 64, "price": 2.5}
    inputs, (adamw, sophia) = priced(size="13B", speedup=1.3, batch=512, context=2048, **asked)
    flops = 6 * 13e9 * 260e9
    hours = flops / (64 * 989e12 * 0.5) / 3600
    assert adamw.flops == Span(Number(flops))
    assert adamw.hours.value.value == pytest.approx(hours)
    assert adamw.device_hours.value.value == pytest.approx(64 * hours)
    assert adamw.dollars.value.value == pytest.approx(64 * hours * 2.5)
    assert adamw.steps.value.value == pytest.approx(260e9 / (512 * 2048))
    # Half the batch every ten steps is 5% more gradients; 1.3 times fewer steps.
    assert sophia.flops.value.value == pytest.approx(flops * 1.05 / 1.3)
    assert sophia.dollars.value.value == pytest.approx(64 * hours * 2.5 * 1.05 / 1.3)
    assert sophia.tokens.value.value == pytest.approx(260e9 / 1.3)
    assert adamw.held == sophia.held == 16 * 13e9  # weight, gradient, two averages
    assert (adamw.refresh, sophia.refresh) == (0, 4 * 13e9)
    assert inputs.price.source == "given"


def test_an_interval_changes_sides_and_the_words_follow_it():
    """Else the good end of a speed-up would be the dear end of the bill, or a guess be called a saving."""
    inputs, (adamw, sophia) = priced(size="355M", speedup=1.1, interval=(0.95, 1.3))
    base = adamw.dollars.value.value
    assert sophia.dollars.low.value == pytest.approx(base * 1.05 / 1.3)
    assert sophia.dollars.high.value == pytest.approx(base * 1.05 / 0.95)
    assert "not distinguishable" in sentence(inputs, inputs.gains[0])
    sure, _ = priced(size="355M", speedup=1.5, interval=(1.3, 1.8))
    assert sentence(sure, sure.gains[0]).endswith("30% less.")
    slow, _ = priced(size="355M", speedup=0.8, interval=(0.7, 0.9))
    assert sentence(slow, slow.gains[0]).endswith("31% more.")


@pytest.mark.parametrize("overhead", [0.0, 0.05, 0.28])
def test_a_contender_pays_above_its_break_even_and_not_below(overhead):
    """Else the number that decides would be wrong."""
    inputs, _ = priced(size="770M", overhead=overhead)
    level = break_even(inputs.gains[0])
    for factor, cheaper in ((1.01, True), (0.99, False)):
        _, (adamw, sophia) = priced(size="770M", overhead=overhead, speedup=level * factor)
        assert (sophia.dollars.value.value < adamw.dollars.value.value) is cheaper


def test_two_million_become_one_only_with_the_claim():
    """Else the sum of the press would stand there without what it needs."""
    inputs, (adamw, sophia) = priced("two-million")
    assert adamw.dollars.value.value == pytest.approx(2e6, rel=1e-3)
    assert sophia.dollars.value.value == pytest.approx(1.05e6, rel=1e-3)
    assert inputs.gains[0].source == "the paper's claim"
    _, (_, equal) = priced("two-million", speedup=1.0)
    assert equal.dollars.value.value > 2e6
    sources = {known.source for known in (inputs.tokens, inputs.price, inputs.utilisation, inputs.devices)}
    assert sources == {"GPT-3, as recalled", "chosen so that AdamW costs $2M", "assumed"}


@pytest.mark.parametrize(("name", "tera"), [("paper-355m", 1195), ("paper-770m", 2550)])
def test_the_papers_table_as_recalled_agrees_with_the_count(name, tera):
    """Else one of the two would be wrong: seconds and operations of a step were recalled independently."""
    inputs, (adamw, sophia) = priced(name)
    per_step = inputs.flops_per_token.value * inputs.tokens_per_step.value
    assert per_step == pytest.approx(tera * 1e12, rel=0.005)
    assert adamw.hours.value.value == pytest.approx(100_000 * inputs.step_seconds.value / 3600)
    reached = per_step / (inputs.step_seconds.value * 8 * 312e12)
    assert inputs.utilisation.value == pytest.approx(reached)
    assert inputs.gains[0].more_flops.value == pytest.approx(0.05)
    assert "as recalled" in inputs.step_seconds.source
    assert sophia.steps.value.value == 50_000


def test_examples_are_complete_and_options_go_over_them():
    """Else an example would hide a value without a source, or hold against an option."""
    assert list(examples()) == ["paper-355m", "paper-770m", "two-million"]
    inputs, _ = priced("paper-770m", price=3.0)
    assert (inputs.price.value, inputs.price.source) == (3.0, "given")
    assert inputs.step_seconds is not None
    inputs, _ = priced("paper-770m", hardware="h100")  # its seconds are of another machine
    assert inputs.step_seconds is None
    assert (inputs.utilisation.value, inputs.utilisation.source) == (0.4, "assumed")
    inputs, _ = priced("paper-770m", contender="sophia-h")  # its overhead is of another optimizer
    assert inputs.gains[0].more_time.value == pytest.approx(3 * 0.0667 / 10)


def test_short_sizes_are_the_recipes():
    """Else 770M would be priced without its attention."""
    for short, name in (("125M", "gpt2-125m"), ("770m", "gpt2-770m"), ("6.6B", "neox-6.6b")):
        assert priced(size=short)[0] == priced(size=name)[0]
        assert f"recipe {name}" in priced(size=short)[0].parameters.source


BAD = {
    "size": ({"size": "large"}, "'large' is no size"),
    "tokens": ({"size": "13B", "tokens": "many"}, "--tokens is 'many'"),
    "price": ({"size": "13B", "price": -1.0}, "--price is -1"),
    "not a number": ({"size": "13B", "step_seconds": math.nan}, "--step-seconds is nan"),
    "utilisation": ({"size": "13B", "utilisation": 1.5}, "utilisation is 1.50"),
    "faster than its peak": ({"size": "13B", "step_seconds": 0.1}, "no device does more"),
    "hardware": ({"size": "13B", "hardware": "abacus"}, "'abacus', whose peak"),
    "two peaks": ({"size": "13B", "hardware": "a100", "peak": 1e12}, "two peaks"),
    "two speeds": ({"size": "13B", "step_seconds": 60.0, "utilisation": 0.3}, "Give one of them"),
    "interval": ({"size": "13B", "speedup": 2.0, "interval": (1.0, 1.5)}, "does not lie in it"),
    "overhead": ({"size": "13B", "overhead": -0.1}, "--overhead is -0.1"),
    "no refresh": ({"size": "13B", "contender": "lion", "speedup": 1.1, "fraction": 0.5}, "no fraction"),
    "contender": ({"size": "13B", "contender": "adam", "speedup": 1.1}, "no contender 'adam'"),
    "nobody's speed-up": ({"size": "13B", "contender": "muon"}, "is not one of muon"),
}


@pytest.mark.parametrize(("asked", "message"), BAD.values(), ids=BAD)
def test_values_that_cannot_be_are_named(asked, message):
    """Else a slip would become a price."""
    with pytest.raises(UsageError, match=message):
        priced(**asked)


def test_the_claim_of_the_paper_is_never_lent_to_another_optimizer():
    """Else `--contender muon` would print a claim that nobody made."""
    with pytest.raises(UsageError, match="the paper's claim"):
        priced("two-million", contender="muon")


def test_open_ends_stay_open():
    """Else "more than twice" would become exactly half the price."""
    ratio = Ratio(math.inf, 1.31, math.inf, 0.25, 2.0, True, "")
    span = _span(ratio)
    assert span == Span(Number(2.0, 1), Number(1.31), Number(2.0, 1))
    assert span.over(4.0) == Span(Number(2.0, -1), Number(2.0, -1), Number(4.0 / 1.31))
    assert _span(Ratio(0.0, 0.0, 0.6, 0.25, 2.0, True, "")).low == Number(0.25, -1)
    assert _span(Ratio(1.2, None, None, 0.25, 2.0, False, "")) == Span(Number(1.2))


@pytest.fixture
def comparison(tmp_path):
    """The records of a comparison in which Sophia-G wastes a fifth of its steps."""
    (tmp_path / "c").mkdir()
    return synthetic.write_comparison(tmp_path / "c", synthetic.Planted(seeds=(0, 1, 2, 3), rest=0.001))


def test_a_measured_speed_up_is_priced_beside_the_claim(comparison):
    """Else the lab would price what others claim, and not what it measured."""
    gain = measured_gain(comparison, "sophia-g")
    assert gain.speedup.value.value == pytest.approx(0.8, abs=0.03)
    assert gain.speedup.low.value < 0.8 < gain.speedup.high.value < 1
    assert gain.more_flops.value == gain.more_time.value == pytest.approx(0.05)
    assert (gain.state.value, gain.measured_at) == (8.0, 1_320_000)
    inputs, (adamw, claimed, own) = priced("two-million", measured=(gain,))
    assert (claimed.name, own.name) == ("sophia-g", "sophia-g, measured")
    base = adamw.dollars.value.value
    assert own.dollars.value.value == pytest.approx(base * 1.05 / gain.speedup.value.value)
    said = sentence(inputs, gain)
    assert "% more." in said
    assert "measured with 1.32M parameters; that it holds for 175B is assumed" in said
    inputs, columns = priced(size="1.3M", measured=(gain,), overhead=0.2)
    assert [column.name for column in columns] == ["adamw", "sophia-g, measured"]  # nothing is claimed
    assert inputs.gains[0].more_time.value == 0.2
    assert "assumed" not in sentence(inputs, inputs.gains[0])


def test_a_comparison_without_a_speed_up_is_refused(comparison, tmp_path):
    """Else half a comparison would be priced as a whole one."""
    with pytest.raises(UsageError, match=r"no contender 'lion'.*sophia-g"):
        measured_gain(comparison, "lion")
    (tmp_path / "one").mkdir()
    one = synthetic.write_comparison(tmp_path / "one", synthetic.Planted(budgets=(300,)))
    with pytest.raises(UsageError, match="a speed-up needs two"):
        measured_gain(one, "sophia-g")


def test_the_command_prints_every_input_and_writes_what_it_printed(comparison, tmp_path, capsys, monkeypatch):
    """Else a price would come without what it is made of."""
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "plan.json"
    arguments = ["plan", "--example", "two-million", "--speedup-from", str(comparison), "--json", str(path)]
    cli.main(arguments)
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for what in ("175B", "300B", "3.12e+14", "45.0%", "$3.21", "chosen so that AdamW costs $2M", "$2.00M"):
        assert what in out
    assert "sophia-g pays above a speed-up of 1.050 in steps." in out
    written = json.loads(path.read_text())
    assert [column["name"] for column in written["columns"]] == ["adamw", "sophia-g", "sophia-g, measured"]
    assert written["columns"][0]["dollars"]["value"]["value"] == pytest.approx(2e6, rel=1e-3)
    assert written["inputs"]["price"]["source"] == "chosen so that AdamW costs $2M"
    assert all(text in out for text in written["sentences"][-1:])
    cli.main(["plan"])  # the paper's table, without any argument
    out = " ".join(capsys.readouterr().out.split())
    assert "as recalled, not held to its text" in out
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", "--example", "three-million"])
    assert end.value.code == 2
    assert "Choose from: paper-355m, paper-770m, two-million" in capsys.readouterr().err
