"""Coming from AdamW: what is translated, what is kept, what is refused."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sophia
from sophia import Sophia
from sophia.step.rules import RULES
from tiny import GPT, data


def test_groups_keep_their_parameters_and_their_proportions():
    """Layer-wise learning rates and exemptions from decay are what people have tuned."""
    model = GPT(layers=1)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "lr": 1e-2, "weight_decay": 0.1},
            {"params": vectors, "lr": 2e-3, "weight_decay": 0.0},
        ]
    )
    opt = Sophia.from_adamw(adamw, model, lr_ratio=0.25, gamma=0.02)
    assert [g["lr"] for g in opt.param_groups] == [2.5e-3, 5e-4]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.4, 0.0]
    assert [g["gamma"] for g in opt.param_groups] == [0.02, 0.02]
    assert [len(g["params"]) for g in opt.param_groups] == [len(matrices), len(vectors)]
    for old, new in zip(adamw.param_groups, opt.param_groups, strict=True):
        assert old["lr"] * old["weight_decay"] == pytest.approx(new["lr"] * new["weight_decay"])


def test_the_peak_is_taken_not_what_a_schedule_has_made_of_it():
    """Built after a scheduler, lr is that of the first warm-up step: close to zero."""
    model = nn.Linear(2, 2)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: (step + 1) / 100)
    assert Sophia.from_adamw(adamw, model).param_groups[0]["lr"] == 5e-3


def test_a_mapping_gives_the_groups_of_the_model():
    """Configuration files have arguments, not optimizers."""
    opt = Sophia.from_adamw({"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}, GPT(layers=1))
    assert [(g["lr"], g["weight_decay"]) for g in opt.param_groups] == [(5e-3, 0.2), (5e-3, 0.0)]
    assert opt.param_groups[0]["betas"] == (0.96, 0.99)


def test_names_survive_and_it_trains():
    """Named parameters keep checkpoints readable; and what comes out is Sophia."""
    model = GPT(layers=1)
    opt = Sophia.from_adamw(torch.optim.AdamW(model.named_parameters(), lr=1e-2), model)
    assert opt.param_groups[0]["param_names"][0] == "tokens.weight"
    model(*data(4))[1].backward()
    opt.step()
    assert opt.stats()["refreshes"] == 1


@pytest.mark.parametrize("rule", ["paper", "damped"])
def test_the_module_is_found_by_the_parameters(rule):
    model = GPT(layers=1)
    opt = Sophia.from_adamw(torch.optim.AdamW(model.parameters(), lr=1e-2), rule=rule)
    model(*data(4))[1].backward()
    opt.step()
    assert opt.stats()["refreshes"] == 1
    with pytest.raises(TypeError, match=r"neither parameters nor a model: .*from_adamw\(\{\.\.\.\}, model\)"):
        Sophia.from_adamw({"lr": 1e-2, "weight_decay": 0.1}, rule=rule)


def test_our_own_rules_have_their_ratio():
    """Measured: so they are ahead of AdamW untuned. An lr_ratio that was given still counts."""
    model = GPT(layers=1)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for rule, rest, ratio in (
        ("damped", "damped", 1),
        ("spectral", "factored", 4),
        ("whitened", "factored", 4),
    ):
        opt = Sophia.from_adamw(adamw, model, rule=rule)
        assert {(g["lr"], g["weight_decay"]) for g in opt.param_groups} == {(ratio * 1e-2, 0.1 / ratio)}
        betas = {(g["rule"], g["betas"]) for g in opt.param_groups}
        assert betas == {(rule, (0.9, 0.9)), (rest, RULES[rest].betas)}
        halved = Sophia.from_adamw({"lr": 1e-2, "weight_decay": 0.1}, model, rule=rule, lr_ratio=0.5)
        assert {g["lr"] for g in halved.param_groups} == {5e-3}
    assert Sophia.from_adamw(adamw, model, rule="paper").param_groups[0]["lr"] == 5e-3


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", ["README.md", "docs/drop-in.md", "the package"])
def test_the_first_line_that_is_copied_has_the_rate_that_is_translated(place):
    """The line at the top had AdamW's whole lr once, and the page on rates the half."""
    text = sophia.__doc__ if place == "the package" else (ROOT / place).read_text(encoding="utf-8")
    was = re.search(r"# was: opt = (torch\.optim\.AdamW\(.*\))\n", text)
    line = re.search(r"^ *opt = (Sophia.*?)(?:  # .*)?$", text, re.M)
    assert was.start() < line.start() < was.end() + 10, "the first line is the one beside AdamW's"
    names = {"torch": torch, "Sophia": Sophia, "model": GPT(layers=1)}
    adamw, opt = eval(was[1], names), eval(line[1], names)
    expected = Sophia.from_adamw(adamw, names["model"]).param_groups[0]
    assert (opt.defaults["lr"], opt.defaults["weight_decay"]) == (expected["lr"], expected["weight_decay"])
    assert opt.defaults["lr"] < adamw.defaults["lr"]


REFUSED = [
    ({"weight_decay": 0.1}, {}, "got a mapping without 'lr'"),
    ("adamw", {}, "got str: it has no parameter groups"),
    ({"lr": 1e-2, "weight_decay": 0.1}, {"lr_ratio": 0.0}, "lr_ratio=0.0: expected a finite number above 0"),
]


@pytest.mark.parametrize(("source", "settings", "message"), REFUSED)
def test_what_cannot_be_translated_is_refused(source, settings, message):
    """A missing lr must not become a default of another optimizer."""
    with pytest.raises(ValueError, match=message):
        Sophia.from_adamw(source, nn.Linear(2, 2), **settings)
