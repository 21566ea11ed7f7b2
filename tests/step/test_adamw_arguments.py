"""Arguments written for AdamW: refused by position, spoken of by name; no word where they are Sophia's."""

import pytest
import torch
from torch import nn

from sophia import Sophia, SophiaWarning
from sophia.lab.optimizers.table import CONTENDERS


def test_positions_after_lr_are_refused():
    """AdamW's order would set gamma = 1e-8 and eps = 0.1, without a word."""
    with pytest.raises(TypeError) as error:
        Sophia(nn.Linear(2, 2), 1e-3, (0.9, 0.95), 1e-8, 0.1)
    for part in (
        "got (0.9, 0.95), 1e-08, 0.1 after lr",
        "these are betas, eps, weight_decay",
        "write Sophia.from_adamw({'lr': 0.001, 'weight_decay': 0.1}, model)",
    ):
        assert part in str(error.value)
    assert Sophia(nn.Linear(2, 2), 1e-3).defaults["lr"] == 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"betas": (0.9, 0.999)},
        {"betas": [0.9, 0.999], "eps": 1e-8},
        {"betas": (0.9, 0.95), "eps": 1e-8},
        {"betas": (0.9, 0.98), "eps": 1e-8, "rule": "damped"},
    ],
    ids=str,
)
def test_adamws_betas_and_eps_get_one_sentence(settings):
    """A recipe of AdamW carried over: h would be averaged over a thousand refreshes."""
    beta2 = settings["betas"][1]
    with pytest.warns(
        SophiaWarning,
        match=rf"like AdamW's, but here betas .* h keeps {1 / (1 - beta2):.0f} refreshes.*name gamma",
    ) as said:
        Sophia(nn.Linear(2, 2), **settings)
    assert len(said) == 1


def test_in_a_group_they_are_spoken_of_too():
    """Hosts write an optimizer's settings into its groups."""
    model = nn.Linear(2, 2)
    groups = [{"params": [p], "betas": (0.9, 0.95), "eps": 1e-8} for p in model.parameters()]
    with pytest.warns(SophiaWarning, match="like AdamW's") as said:
        Sophia(groups, model=model)
    assert len(said) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eps": 1e-8},
        {"eps": 1e-7, "betas": (0.9, 0.95)},
        {"betas": (0.9, 0.95)},
        {"betas": (0.96, 0.99), "eps": 1e-8},
        {"betas": (0.8, 0.95), "eps": 1e-8},
        {"betas": (0.9, 0.95), "eps": 1e-8, "gamma": 0.05},
        {"betas": (0.9, 0.999), "gamma": 0.05},
        {"rule": "damped"},
    ],
    ids=str,
)
def test_no_word_about_settings_of_sophia(settings):
    """Warnings are errors here: what our own pages and searches use must pass."""
    Sophia(nn.Linear(2, 2), **settings)


def test_no_word_about_a_contender_with_any_setting_of_its_search():
    """A search that tries beta1 = 0.9, beta2 = 0.95, eps = 1e-8 means them."""
    contender = CONTENDERS["sophia-g"]
    settings = {**contender.defaults, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    contender.build(nn.Linear(2, 2), settings, 0)


def test_from_adamw_passes_none_of_them_on():
    """The sentence would come where the user did as he was told."""
    model = nn.Linear(2, 2)
    Sophia.from_adamw(torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)), model)
