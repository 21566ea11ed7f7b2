"""docs/building-on.md: each example as it stands on the page."""

import copy
import warnings

import pytest
import torch
from pages import refreshed, run
from torch import nn

from sophia import Sophia, SophiaWarning
from sophia.step.groups import COUNTERS
from sophia.step.named_groups import SETTINGS
from tiny import GPT, T, data

PAGE = "../building-on.md"


def batches(number):
    return [data(4, seed=seed) for seed in range(number)]


def h_of(opt, parameters):
    return [opt.state[p]["hessian"] if opt.state.get(p) else None for p in parameters]


def test_groups_by_name():
    """The settings of another pattern, or a decay that nobody asked for."""
    model = GPT()
    names, _ = run(PAGE, "Groups by name", model=model)
    found = {
        name: (group["lr"], group["weight_decay"], group["gamma"])
        for group in names["opt"].param_groups
        for name in group["param_names"]
    }
    expected = {
        name: (1e-4, 0.1, 0.05)
        if name.startswith("tokens.")
        else (3e-4, 0.0, 0.05)
        if "norm" in name
        else (3e-4, 0.1 if p.ndim > 1 else 0.0, 0.1 if name.startswith("blocks.1.") else 0.05)
        for name, p in model.named_parameters()
    }
    assert found == expected
    model(*data(4))[1].backward()
    names["opt"].step()
    assert names["opt"]._model is model


def test_other_settings_at_a_resume(tmp_path, monkeypatch):
    """A run that goes on with the settings of the file, or with others from its next step on only in part."""
    monkeypatch.chdir(tmp_path)
    runs = []
    for resumed in (False, True):
        model = GPT()
        opt = Sophia(model, lr=3e-4)
        for x, y in batches(3):
            model(x, y)[1].backward()
            opt.step()
            opt.zero_grad()
        if resumed:
            torch.save(opt.state_dict(), "opt.pt")
            with pytest.warns(
                SophiaWarning, match=r"its own settings, as torch's do: gamma=0\.05 \(not 0\.1\)\."
            ):
                Sophia(model, lr=1e-4, gamma=0.1).load_state_dict(torch.load("opt.pt"))
            opt = run(PAGE, "Other settings at a resume", model=model)[0]["opt"]
        else:
            for group in opt.param_groups:
                group["lr"], group["gamma"] = 1e-4, 0.1
        for x, y in batches(9):
            model(x, y)[1].backward()
            opt.step()
            opt.zero_grad()
        assert opt.param_groups[0]["step"] == 12
        runs.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


def test_a_scheduler_takes_the_rates_of_its_base():
    """The sentence on schedulers: a rate written into the groups alone lasts one step."""
    model = GPT()
    opt = Sophia(model, lr=3e-4, mode="manual")
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
    schedule.base_lrs = [1e-4] * len(opt.param_groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: no step of the optimizer before
        schedule.step()
    assert {group["lr"] for group in opt.param_groups} == {0.5e-4}


def test_freezing_and_unfreezing():
    """An h that is not there for the first step, or that is lost, or moves, while its layer is frozen."""
    model, seen = GPT(tied=False), []

    def watched():
        for x, y in batches(32):
            opt = names.get("opt")
            if opt is not None:
                tokens, block = model.tokens.weight, model.blocks[0].qkv.weight
                kept = [None if h is None else h.clone() for h in h_of(opt, (tokens, block))]
                seen.append((tokens.detach().clone(), *kept))
            yield x, y

    names = {"model": model, "batches": watched()}
    names, steps = run_in(names, "Freezing and unfreezing")
    assert refreshed(steps) == [0, 10, 20, 30]
    assert all(block is None for _, _, block in seen[:11])
    assert bool((seen[11][2] > 0).any())  # at the step at which it was unfrozen
    assert not torch.equal(seen[11][2], seen[31][2])
    assert all(torch.equal(seen[21][i], seen[31][i]) for i in (0, 1))
    assert not torch.equal(seen[11][0], seen[21][0])


def run_in(names, title):
    """Run an example in this very dictionary, which its data look into."""
    from pages import examples, watching

    with watching() as steps:
        exec(compile(examples(PAGE)[title], title, "exec"), names)
    return names, steps


def two():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
    return encoder, nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 5))


def vectors(number):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 4, generator=g), torch.randint(0, 5, (16,), generator=g)) for _ in range(number)]


@pytest.mark.filterwarnings("ignore:the rows of")
@pytest.mark.parametrize("title", ["Several modules under one optimizer", "Several modules by hand"])
def test_several_modules(title):
    """Curvature of one of them, or statistics that move at a refresh."""
    encoder, decoder = two()
    names, steps = run(PAGE, title, encoder=encoder, decoder=decoder, batches=vectors(12))
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {16}
    parameters = [*encoder.parameters(), *decoder.parameters()]
    assert all(bool((h > 0).any()) for h in h_of(names["opt"], parameters))
    assert encoder[1].num_batches_tracked == 12


def test_beside_another_optimizer():
    """A part of a model that finds no module, or the part's."""
    model = GPT()
    names, steps = run(PAGE, "Beside another optimizer", model=model, batches=batches(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {T}
    opt = names["optimizers"][1]
    assert opt._model is model
    assert all(bool((h > 0).any()) for h in h_of(opt, names["rest"]))


def test_training_in_evaluation_mode():
    """A refused loop, or one with dropout in its refreshes."""
    model = GPT(dropout=0.5)
    plain = copy.deepcopy(model)
    names, steps = run(PAGE, "Training in evaluation mode", model=model, batches=batches(12))
    assert refreshed(steps) == [0, 10]
    for block in plain.blocks:
        block.dropout.p = 0.0
    opt = Sophia(plain, lr=1e-4)
    for x, y in batches(12):
        plain(x, y)[1].backward()
        opt.step()
        opt.zero_grad()
    parameters = [list(each.parameters()) for each in (model, plain)]
    assert all(map(torch.equal, h_of(names["opt"], parameters[0]), h_of(opt, parameters[1])))


# ---- Sophia.groups ----


def test_no_patterns_is_the_whole_model():
    """Groups of another order or decay than those of ``Sophia(model)``."""
    model = GPT()
    found = Sophia(Sophia.groups(model, {}, weight_decay=0.3))
    given = Sophia(model, weight_decay=0.3)
    of = [
        [(group["param_names"], group["weight_decay"], group["lr"]) for group in opt.param_groups]
        for opt in (found, given)
    ]
    assert of[0] == of[1]


def test_the_settings_of_a_group_are_all_that_there_are():
    """A setting that the groups have and that cannot be given by name."""
    defaults = set(Sophia(nn.Linear(2, 2)).defaults) - set(COUNTERS) - {"seed"}
    assert set(SETTINGS) == defaults


def test_tied_parameters_have_all_their_names():
    """``head.weight`` is the table of tokens, and named_parameters() has the first name alone."""
    groups = Sophia.groups(GPT(), {"head.*": {"lr": 1e-5}})
    assert [name for name, _ in groups[0]["params"]] == ["tokens.weight"]


def test_the_first_pattern_counts_and_decay_of_nothing_is_one_group():
    """Two patterns for a parameter, and groups of nothing where vectors and matrices decay alike."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    groups = Sophia.groups(model, {"1.bias": {"lr": 1.0}, "1.*": {"lr": 2.0}}, weight_decay=0.0)
    assert [([name for name, _ in g["params"]], g.get("lr"), g["weight_decay"]) for g in groups] == [
        (["1.bias"], 1.0, 0.0),
        (["1.weight"], 2.0, 0.0),
        (["0.weight"], None, 0.0),
        (["0.bias"], None, 0.0),
    ]


def test_rules_by_name():
    """A group that names its rule, under another for the rest."""
    model = GPT()
    opt = Sophia(Sophia.groups(model, {"positions.*": {"rule": "paper"}}), rule="damped")
    rules = {name: group["rule"] for group in opt.param_groups for name in group["param_names"]}
    assert {name for name, rule in rules.items() if rule == "paper"} == {"positions.weight"}
    assert set(rules) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"embed": {}}, r"'embed' matches the name of no parameter.*model\.named_parameters"),
        ({"token": {}}, r"Names near to it: tokens\.weight\. A pattern is matched with the whole name"),
        ({"Blocks.0.*": {}}, r"Names near to it: blocks\.0\.norm1\.weight, "),
        ({"nrom.weight": {}}, r"Names near to it: norm\.weight"),
        ({"*": {}, "head.*": {}}, r"all that 'head\.\*' matches is taken .*\(head\.weight by '\*'\)"),
        ({"*": {"learning_rate": 1.0}}, r"sets 'learning_rate', which is no setting of a parameter group"),
        ({"*": {"weight_deacy": 1.0}}, r"Did you mean 'weight_decay'\?"),
        ({"*": {"params": []}}, r"sets 'params'"),
    ],
)
def test_what_has_no_effect_is_an_error(patterns, message):
    """A misspelt name, after which a model trains with the settings of the rest."""
    with pytest.raises(ValueError, match="Sophia.groups: .*" + message):
        Sophia.groups(GPT(), patterns)


def test_values_are_checked_where_all_are():
    """A rate below zero in a group."""
    model = GPT()
    with pytest.raises(ValueError, match="lr=-1"):
        Sophia(Sophia.groups(model, {"*": {"lr": -1.0}}))
