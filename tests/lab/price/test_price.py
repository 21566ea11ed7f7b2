"""`sophia price`: hours and dollars, held to arithmetic done here by hand; and claims that stay claims."""

import json
import math
import re
import tomllib
from pathlib import Path

import pytest
import synthetic

from sophia.lab import cli
from sophia.lab.analysis.speedup import Ratio
from sophia.lab.commands.price import Price
from sophia.lab.price.bill import Amount, Gain, Known, amount_words, costs, costs_of_adamw, sentence
from sophia.lab.price.inputs import examples, find_inputs
from sophia.lab.support.errors import UsageError


def priced(example=None, **options):
    """Inputs, gain, AdamW's costs, and the contender's without their intervals."""
    inputs, gain = find_inputs(options, example)
    adamw = costs_of_adamw(inputs)
    return inputs, gain, adamw, {name: cost[0].value for name, cost in costs(adamw, gain).items()}


def said(example=None, **options):
    inputs, gain = find_inputs(options, example)
    return sentence(costs_of_adamw(inputs), gain, inputs["parameters"].value)


def test_the_bill_of_a_bare_size_is_six_flops_a_parameter_and_token():
    """Else every price would be off by a factor."""
    options = {"tokens": "260B", "hardware": "h100", "utilisation": 0.5, "devices": 64, "price": 2.5}
    inputs, gain, adamw, sophia = priced(size="13B", speedup=1.3, batch=512, context=2048, **options)
    flops = 6 * 13e9 * 260e9
    hours = flops / (64 * 989e12 * 0.5) / 3600
    assert adamw == pytest.approx(
        {
            "steps": 260e9 / (512 * 2048), "tokens": 260e9, "flops": flops,
            "hours": hours, "device_hours": 64 * hours, "dollars": 64 * hours * 2.5,
        }
    )  # fmt: skip
    # Half the batch every ten steps is 5% more gradients; 1.3 times fewer steps.
    assert sophia["flops"] == pytest.approx(flops * 1.05 / 1.3)
    assert sophia["dollars"] == pytest.approx(64 * hours * 2.5 * 1.05 / 1.3)
    assert sophia["tokens"] == pytest.approx(260e9 / 1.3)
    assert gain.state.value == 8  # two averages in float32
    assert inputs["price"] == (2.5, "given")


def test_an_interval_changes_sides_and_the_words_follow_it():
    """Else the good end of a speed-up would be the dear end of the bill, or a guess be called a saving."""
    inputs, gain = find_inputs({"size": "355M", "speedup": 1.1, "interval": (0.95, 1.3)})
    adamw = costs_of_adamw(inputs)
    _, low, high = costs(adamw, gain)["dollars"]
    assert low.value == pytest.approx(adamw["dollars"] * 1.05 / 1.3)
    assert high.value == pytest.approx(adamw["dollars"] * 1.05 / 0.95)
    assert "not distinguishable" in said(size="355M", speedup=1.1, interval=(0.95, 1.3))
    assert said(size="355M", speedup=1.5, interval=(1.3, 1.8)).endswith("30% less.")
    assert said(size="355M", speedup=0.8, interval=(0.7, 0.9)).endswith("31% more.")


@pytest.mark.parametrize("overhead", [0.0, 0.05, 0.28])
def test_a_contender_pays_above_its_break_even_and_not_below(overhead):
    """Else the number that decides would be wrong."""
    for factor, cheaper in ((1.01, True), (0.99, False)):
        _, gain, adamw, sophia = priced(size="770M", overhead=overhead, speedup=(1 + overhead) * factor)
        assert gain.time.value == overhead
        assert (sophia["dollars"] < adamw["dollars"]) is cheaper


def test_two_million_become_one_only_with_the_claim():
    """Else the sum of the press would stand there without what it needs."""
    _, gain, adamw, sophia = priced("two-million")
    assert adamw["dollars"] == pytest.approx(2e6, rel=1e-3)
    assert sophia["dollars"] == pytest.approx(1.05e6, rel=1e-3)
    assert gain.source == "example two-million"
    assert priced("two-million", speedup=1.0)[3]["dollars"] > 2e6


@pytest.mark.parametrize(("name", "tera"), [("paper-355m", 1195), ("paper-770m", 2550)])
def test_the_papers_table_as_recalled_agrees_with_the_count(name, tera):
    """Else one of the two would be wrong: seconds and operations of a step were recalled independently."""
    inputs, gain, adamw, sophia = priced(name)
    per_step = adamw["flops"] / adamw["steps"]
    seconds = inputs["step_seconds"].value
    assert per_step == pytest.approx(tera * 1e12, rel=0.005)
    assert adamw["hours"] == pytest.approx(100_000 * seconds / 3600)
    assert inputs["utilisation"].value == pytest.approx(per_step / (seconds * 8 * 312e12))
    assert gain.flops.value == pytest.approx(0.05)
    assert sophia["steps"] == 50_000


def test_every_value_of_an_example_is_an_option_with_its_source_beside_it():
    """Else an example would hide where a value is from, or hold one that nothing reads."""
    assert list(examples()) == ["paper-355m", "paper-770m", "two-million"]
    for path in examples().values():
        values = tomllib.loads(path.read_text())
        assert set(values) <= set(Price.__dataclass_fields__)
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"\w+ = \S+ +# \w.+", line) for line in lines)


def test_options_go_over_an_example():
    """Else an example would hold against an option, or lend its seconds to another machine."""
    inputs, *_ = priced("paper-770m", price=3.0)
    assert inputs["price"] == (3.0, "given")
    assert "step_seconds" in inputs
    inputs, *_ = priced("paper-770m", hardware="h100")  # its seconds are of another machine
    assert "step_seconds" not in inputs
    assert inputs["utilisation"] == (0.4, "assumed")
    assert inputs["peak"].value == 989e12
    _, gain, *_ = priced("paper-770m", contender="sophia-h")  # its overhead is of another optimizer
    assert gain.time.value == pytest.approx(3 * 0.0667 / 10)


def test_short_sizes_are_the_recipes():
    """Else 770M would be priced without its attention."""
    for short, name in (("125M", "gpt2-125m"), ("770m", "gpt2-770m"), ("6.6B", "neox-6.6b")):
        assert priced(size=short) == priced(size=name)
        assert f"recipe {name}" in priced(size=short)[0]["parameters"].source


BAD = {
    "no size": ({}, "no size to price"),
    "size": ({"size": "large"}, "'large' is no size"),
    "tokens": ({"size": "13B", "tokens": "many"}, "--tokens is 'many'"),
    "price": ({"size": "13B", "price": -1.0}, "--price is -1"),
    "not a number": ({"size": "13B", "step_seconds": math.nan}, "--step-seconds is nan"),
    "utilisation": ({"size": "13B", "utilisation": 1.5}, "utilisation is 1.50"),
    "faster than its peak": ({"size": "13B", "step_seconds": 0.1}, "no device does more"),
    "hardware": ({"size": "13B", "hardware": "abacus"}, "'abacus', whose peak"),
    "two peaks": ({"size": "13B", "hardware": "a100", "peak": 1e12}, "--peak and --hardware say one"),
    "two speeds": ({"size": "13B", "step_seconds": 60.0, "utilisation": 0.3}, "Give one of them"),
    "two speed-ups": ({"size": "13B", "speedup": 2.0, "speedup_from": "x"}, "Give one of them"),
    "interval": ({"size": "13B", "speedup": 2.0, "interval": (1.0, 1.5)}, "does not lie in it"),
    "overhead": ({"size": "13B", "overhead": -0.1}, "--overhead is -0.1"),
    "contender": ({"size": "13B", "contender": "adam", "speedup": 1.1}, "no contender 'adam'"),
    "nobody's speed-up": ({"size": "13B", "contender": "muon"}, "is not one of muon"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_values_that_cannot_be_are_named(options, message):
    """Else a slip would become a price."""
    with pytest.raises(UsageError, match=message):
        find_inputs(options)


def test_the_claim_of_the_paper_is_never_lent_to_another_optimizer():
    """Else `--contender muon` would print a claim that nobody made."""
    with pytest.raises(UsageError, match=r"example two-million\) is not one of muon"):
        find_inputs({"contender": "muon"}, "two-million")


def test_open_ends_stay_open():
    """Else "more than twice" would become exactly half the price."""
    none = Known(0.0, "")

    def of(*ratio):
        gain = Gain("x", Ratio(*ratio, 0.25, 2.0, True, ""), "", none, none, none)
        return costs({"dollars": 4.0}, gain)["dollars"], sentence({"dollars": 4.0}, gain, 1.0)

    amounts, words = of(math.inf, 1.31, math.inf)
    assert amounts == (Amount(2.0, "less than "), Amount(2.0, "less than "), Amount(4.0 / 1.31))
    assert amount_words(amounts, "{:.2f}".format) == "less than 2.00 (less than 2.00 to 3.05)"
    assert words.endswith("over 50% less.")
    amounts, words = of(0.0, 0.0, 0.6)
    assert amounts == (Amount(16.0, "more than "), Amount(4.0 / 0.6), Amount(16.0, "more than "))
    assert words.endswith("over 300% more.")
    assert of(1.25, None, None)[0] == (Amount(3.2),)


@pytest.fixture
def comparison(tmp_path):
    """The records of a comparison in which Sophia-G wastes a fifth of its steps."""
    (tmp_path / "c").mkdir()
    return synthetic.write_comparison(tmp_path / "c", synthetic.Planted(seeds=(0, 1, 2, 3), rest=0.001))


def test_a_measured_speed_up_takes_the_place_of_the_claim(comparison):
    """Else the lab would price what others claim, and not what it measured."""
    _, gain, adamw, sophia = priced("two-million", speedup_from=comparison)
    assert gain.speedup.value == pytest.approx(0.8, abs=0.03)
    assert gain.speedup.low < 0.8 < gain.speedup.high < 1
    assert gain.flops.value == pytest.approx(0.05)
    assert gain.flops == gain.time
    assert (gain.state.value, gain.measured_at) == (8.0, 1_320_000)
    assert sophia["dollars"] == pytest.approx(adamw["dollars"] * 1.05 / gain.speedup.value)
    words = said("two-million", speedup_from=comparison)
    assert "% more." in words
    assert "measured with 1.32M parameters; that it holds for 175B is assumed" in words
    assert priced(size="1.3M", speedup_from=comparison, overhead=0.2)[1].time == (0.2, "given")
    assert "assumed" not in said(size="1.3M", speedup_from=comparison)


def test_a_comparison_without_a_speed_up_is_refused(comparison, tmp_path):
    """Else half a comparison would be priced as a whole one."""
    with pytest.raises(UsageError, match=r"no contender 'lion'.*sophia-g"):
        find_inputs({"size": "13B", "speedup_from": comparison, "contender": "lion"})
    (tmp_path / "one").mkdir()
    one = synthetic.write_comparison(tmp_path / "one", synthetic.Planted(budgets=(300,)))
    with pytest.raises(UsageError, match="a speed-up needs two"):
        find_inputs({"size": "13B", "speedup_from": one})


def test_the_command_prints_every_input_and_writes_what_it_printed(comparison, tmp_path, capsys, monkeypatch):
    """Else a price would come without what it is made of."""
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "price.json"
    cli.main(["price", "--example", "two-million", "--speedup-from", str(comparison), "--json", str(path)])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for what in ("175B", "300B", "3.12e+14", "45.0%", "$3.21", "two-million.toml", "$2.00M"):
        assert what in out
    assert "sophia-g pays above a speed-up of 1.050 in steps." in out
    written = json.loads(path.read_text())
    assert written["costs"]["adamw"]["dollars"] == pytest.approx(2e6, rel=1e-3)
    assert len(written["costs"]["sophia-g"]["dollars"]) == 3
    assert written["inputs"]["price"] == {"value": 3.21, "source": "example two-million"}
    assert all(text in out for text in written["sentences"])
    with pytest.raises(SystemExit) as end:
        cli.main(["price", "--example", "three-million"])
    assert end.value.code == 2
    assert "Choose from: paper-355m, paper-770m, two-million" in capsys.readouterr().err


PAGE = Path(__file__).parents[3] / "docs" / "costs.md"


def test_the_numbers_of_the_page_are_the_commands(capsys, monkeypatch):
    """Else the page would go on with a price that the command no longer gives."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(PAGE.parents[1])

    def row(name, *options):
        cli.main(["price", *options])
        lines = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
        return next(cells[2:-1] for cells in lines if cells[1:2] == [name])

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    papers = [cells for cells in rows if len(cells) == 3 and cells[0].startswith("paper-")]
    for name, *columns in papers:
        hours, money = row("device-hours", "--example", name), row("dollars", "--example", name)
        assert columns == [f"{h} device-hours, {m}" for h, m in zip(hours, money, strict=True)]
    press = [cells for cells in rows if len(cells) == 3 and cells[2].startswith("$")]
    for options, _, money in press:
        given = re.findall(r"`(.*)`", options)
        assert row("dollars", "--example", "two-million", *" ".join(given).split())[1] == money
    assert (len(papers), len(press)) == (2, 6)


def test_the_old_name_still_works_and_says_the_new_one(capsys):
    """Else a script of the last release would end with a list of subcommands."""
    cli.main(["price"])  # the paper's table, without any argument
    now = capsys.readouterr()
    cli.main(["plan"])
    then = capsys.readouterr()
    assert then.out == now.out
    assert "sophia plan is now sophia price" in then.err
    assert not now.err
