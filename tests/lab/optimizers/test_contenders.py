import inspect
import io

import pytest
import torch

from needs import MUON, names_of
from sophia import Sophia
from sophia.lab import cli
from sophia.lab.config.run import Model
from sophia.lab.config.search_space import WARMUP, Choice, LogRange
from sophia.lab.models.build import gpt2, parameter_count
from sophia.lab.optimizers import table
from sophia.lab.optimizers.adahessian import AdaHessianStep
from sophia.lab.optimizers.contender import state_bytes
from sophia.lab.optimizers.lion import Lion
from sophia.lab.optimizers.signum import Signum
from sophia.lab.optimizers.table import CONTENDERS, find
from sophia.lab.support.errors import LabError, UsageError

SMALL = Model(layers=1, width=16, heads=2, context=8)


def steps(model, optimizer, count):
    torch.manual_seed(0)
    for _ in range(count):
        x = torch.randint(4096, (2, 8))
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", names_of(CONTENDERS))
def test_each_row_trains_and_goes_on_from_its_state(name):
    """Else a contender would fail in the middle of somebody's comparison, or not survive a restart."""
    row = find(name)
    settings = row.settings({})
    straight = gpt2(SMALL, seed=1)
    optimizer = row.build(straight, settings, 1)
    steps(straight, optimizer, 2)
    buffer = io.BytesIO()
    torch.save({"o": optimizer.state_dict(), "m": straight.state_dict()}, buffer)
    steps(straight, optimizer, 2)

    again = gpt2(SMALL, seed=2)
    fresh = row.build(again, settings, 1)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    again.load_state_dict(state["m"])
    fresh.load_state_dict(state["o"])
    steps(again, fresh, 2)
    for one, two in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", names_of(CONTENDERS))
def test_each_row_owns_every_parameter_once_and_decays_matrices_alone(name):
    """Else a contender would leave weights untrained, or decay gains that others leave alone."""
    model = gpt2(SMALL, seed=1)
    optimizer = find(name).build(model, find(name).settings({}), 1)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.ndim >= 2)


@pytest.mark.parametrize("name", names_of(CONTENDERS))
def test_the_state_has_the_size_that_the_row_says(name):
    """Else the cost table would be wrong."""
    model = gpt2(SMALL, seed=1)
    row = find(name)
    optimizer = row.build(model, row.settings({}), 1)
    steps(model, optimizer, 2)
    if name == "adafactor":  # rows and columns
        assert state_bytes(optimizer) < parameter_count(model)
    elif name == "muon":  # its row speaks of the matrices that Muon itself does
        hidden = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n)
        assert state_bytes(optimizer.parts[0]) == hidden * row.state_per_parameter
    elif name == "sophia-spectral":  # its row likewise; other matrices have two of the short side beside m
        hidden = {id(p) for g in optimizer.param_groups if g["rule"] == "spectral" for p in g["params"]}
        rest = [p for p in model.parameters() if id(p) not in hidden]
        more = [2 * min(p.shape) ** 2 + sum(p.shape) + 1 if p.ndim == 2 else p.numel() + 1 for p in rest]
        assert len(hidden) > 3
        assert state_bytes(optimizer) == 4 * (parameter_count(model) + sum(more))
    elif name == "sophia-whitened":  # m, and two matrices of each short side: by shapes; its row has GPT-2's
        squares = sum(2 * min(p.shape) ** 2 for p in model.parameters() if p.ndim == 2)
        assert 1 <= state_bytes(optimizer) / 4 / (parameter_count(model) + squares) < 1.1
    else:
        ratio = state_bytes(optimizer) / (parameter_count(model) * row.state_per_parameter)
        assert 1 <= ratio < 1.01


@pytest.mark.parametrize("name", names_of(CONTENDERS))
def test_the_search_space_is_about_real_settings(name):
    """Else a search would vary something that does not exist."""
    row = find(name)
    for setting, kind in row.space.items():
        assert setting in row.defaults or setting == WARMUP
        if isinstance(kind, LogRange):
            assert 0 < kind.low < kind.high
        else:
            assert isinstance(kind, Choice)
            assert all(type(v) is type(row.defaults.get(setting, 0.1)) for v in kind.values)
            assert list(kind.values) == sorted(kind.values)  # the ends are the edge
    assert "lr" in row.space


def test_costs_count_the_hessian_passes():
    """Else speed-up per gradient evaluation would flatter Sophia."""
    s = find("sophia-g").settings({"update_every": 10, "fraction": 0.5})
    assert find("sophia-g").gradients(s) == pytest.approx(0.05)
    assert find("sophia-h").gradients(s) == pytest.approx(0.15)
    assert find("adamw").gradients(find("adamw").settings({})) == 0


def test_unknown_names_and_settings_are_refused():
    """Else a misspelt setting would silently be the default."""
    with pytest.raises(UsageError, match="no contender 'adam'"):
        find("adam")
    with pytest.raises(UsageError, match="no setting 'gama'"):
        find("sophia-g").settings({"gama": 0.1})
    with pytest.raises(UsageError, match="lr is 'high'"):
        find("adamw").settings({"lr": "high"})
    assert find("adamw").settings({"lr": 1})["lr"] == 1.0


def test_without_muon_the_message_names_the_version(monkeypatch):
    """Else an old torch would end in an attribute error."""
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(LabError, match=r"torch 2\.9"):
        find("muon").build(gpt2(SMALL, seed=1), find("muon").settings({}), 1)


def test_lion_and_signum_take_the_steps_of_their_papers():
    """Else the rivals would be straw men."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    lion = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    p.grad = torch.tensor([1.0, -1.0, 0.0])
    lion.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.95 - 0.1, -1.9 + 0.1, 2.85]))
    p.grad = torch.tensor([-0.05, 0.0, 1.0])  # 0.9 m + 0.1 g = .009 - .005 > 0: momentum wins
    before = p.detach().clone()
    lion.step()
    torch.testing.assert_close(p.detach(), before * 0.95 - 0.1 * torch.tensor([1.0, -1.0, 1.0]))
    q = torch.nn.Parameter(torch.tensor([1.0]))
    signum = Signum([q], lr=0.1, beta=0.5, weight_decay=0.0)
    for gradient, value in ((2.0, 0.9), (-1.0, 0.9), (-1.0, 1.0)):  # m = 1, 0, -0.5
        q.grad = torch.tensor([gradient])
        signum.step()
        torch.testing.assert_close(q.detach(), torch.tensor([value]))


def test_adahessian_divides_by_the_root_of_squared_curvature():
    """Else the row would be another optimizer under that name."""
    models = [gpt2(SMALL, seed=1) for _ in range(3)]
    passes = {"fraction": 1.0, "seed": 3}
    # With betas 0 a first step leaves the gradient in m and the estimate itself in h.
    ours = Sophia(models[0], lr=0.0, betas=(0.0, 0.0), estimator="hutchinson", **passes)
    steps(models[0], ours, 1)
    rival = AdaHessianStep(models[1], lr=0.1, betas=(0.9, 0.5), eps=1e-6, weight_decay=0.0, **passes)
    steps(models[1], rival, 1)
    for p, q, start in zip(*(m.parameters() for m in models), strict=True):
        g, h = (ours.state[p][name] for name in ("exp_avg", "hessian"))
        torch.testing.assert_close(q.detach(), start.detach() - 0.1 * g / (h.abs() + 1e-6))


@MUON
def test_a_pair_obeys_one_learning_rate_schedule():
    """Else half of Muon's parameters would be trained at a constant rate."""
    model = gpt2(SMALL, seed=1)
    pair = table.find("muon").build(model, find("muon").settings({}), 1)
    before = [p.detach().clone() for p in model.parameters()]
    for group in pair.param_groups:
        group["lr"] = 0.0
    steps(model, pair, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    loss = pair.step(lambda: torch.tensor(1.5))
    assert float(loss) == 1.5


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson", "empirical_fisher"])
def test_the_ablated_step_with_nothing_ablated_is_sophias(estimator):
    """Else an ablation would measure its own machinery."""
    models = [gpt2(SMALL, seed=1) for _ in range(2)]
    own = {"lr": 1e-2, "gamma": 0.1, "eps": 1e-6}
    settings = CONTENDERS["ablated"].settings({**own, "preconditioner": estimator, "update_every": 2})
    name = {"gnb": "sophia-g", "hutchinson": "sophia-h", "empirical_fisher": "sophia-ef"}[estimator]
    optimizers = [
        CONTENDERS["ablated"].build(models[0], settings, 1),
        CONTENDERS[name].build(models[1], CONTENDERS[name].settings({**own, "update_every": 2}), 1),
    ]
    if estimator == "gnb":  # the ablations speak of Algorithm 2, with one label a prediction
        optimizers[1].estimator.likelihood.pairs = 0
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, 5)
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-4)  # rounding grows: 3e-5 after five steps
    assert optimizers[0].stats()["unclipped"] == pytest.approx(optimizers[1].stats()["unclipped"], abs=1e-3)


@pytest.mark.parametrize(
    ("preconditioner", "bound", "expected"),
    [
        ("none", "clip", lambda m, h: (m / 1e-3).clamp(-1, 1)),
        ("none", "none", lambda m, h: m / 1e-3),
        ("gnb", "none", lambda m, h: m / (1e-3 * h).clamp(min=1e-6)),
        ("adahessian", "clip", lambda m, h: (m / (1e-3 * h.sqrt()).clamp(min=1e-6)).clamp(-1, 1)),
        ("none", "normalise", None),
    ],
)
def test_the_ablated_step_is_what_its_settings_say(preconditioner, bound, expected):
    """Else a variant of the ablations would be another one."""
    model = gpt2(SMALL, seed=1)
    row = CONTENDERS["ablated"]
    over = {"lr": 1e-3, "gamma": 1e-3, "eps": 1e-6, "weight_decay": 0.0}
    optimizer = row.build(model, row.settings({**over, "preconditioner": preconditioner, "bound": bound}), 1)
    before = [p.detach().clone() for p in model.parameters()]
    steps(model, optimizer, 1)
    moved = [(b - p.detach()) / 1e-3 for b, p in zip(before, model.parameters(), strict=True)]
    state = [optimizer.state[p] for p in model.parameters()]
    if preconditioner == "none":
        assert all((s["hessian"] == 1).all() for s in state)
    if expected is None:
        numbers = torch.cat([x.flatten() for x in moved])
        assert float(numbers.square().mean().sqrt()) == pytest.approx(1, rel=1e-3)
        ms = torch.cat([s["exp_avg"].flatten() for s in state])
        assert torch.allclose(numbers / numbers.norm(), ms / ms.norm(), atol=1e-4)
    else:
        for step, s in zip(moved, state, strict=True):
            want = expected(s["exp_avg"], s["hessian"])
            assert torch.allclose(step, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()) + 1e-3)


@pytest.mark.parametrize("wrong", [{"preconditioner": "newton"}, {"bound": "soft"}])
def test_an_ablation_that_is_none_is_refused(wrong):
    """Else a misspelt ablation would be Sophia itself."""
    row = CONTENDERS["ablated"]
    with pytest.raises(UsageError, match=f"{next(iter(wrong.values()))!r}, which is none"):
        row.build(gpt2(SMALL, seed=1), row.settings(wrong), 1)


def test_the_table_for_people_says_costs_and_spaces(capsys, monkeypatch):
    """Else nobody could see what is compared, or what a search would vary, without reading code."""
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["contenders"])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(lines) >= set(table.CONTENDERS)
    assert lines["adamw"].split()[-3:] == ["1", "8", "5"]
    assert lines["sophia-g"].split()[-3:] == ["1.05", "8", "9"]
    hutchinson = table.find("sophia-h")
    cost = 1 + hutchinson.gradients(hutchinson.settings({}))
    assert lines["sophia-h"].split()[-3:] == [f"{cost:.3g}", "8", "9"]
    assert cost > 1.05, "a Hessian-vector product costs more than a gradient"
    cli.main(["contenders", "sophia-g", "torch.optim:RAdam"])
    out = capsys.readouterr().out
    assert "gamma = 0.05   searched: 0.001 to 1" in out
    assert "warmup = the schedule's   searched: 0.05 or 0.1 or 0.2" in out
    assert "radam" in out
    assert "In a script: Sophia(model), but that has fraction = 0.125\n" in out


LINES = {name: row for name, row in CONTENDERS.items() if row.line}


def test_each_contender_of_the_library_names_its_line():
    """Else what is compared could be another Sophia than the one that is used."""
    assert set(LINES) == {name for name in CONTENDERS if name.partition("-")[0] == "sophia"}


@pytest.mark.parametrize("name", LINES)
def test_a_contender_is_what_its_line_gives_but_for_what_it_lists(name):
    """Else a comparison would measure another optimizer than the one line, and nothing would say so."""
    row, model = LINES[name], gpt2(SMALL, seed=1)
    built, line = row.build(model, row.settings({}), 0), eval(row.line, {"Sophia": Sophia, "model": model})
    given, usual = settings_of(built), settings_of(line)
    other = {setting: usual[setting] for setting in usual if given[setting] != usual[setting]}
    assert other == row.line_has
    assert {setting: row.defaults[setting] for setting in other} == {s: given[s] for s in other}


def settings_of(optimizer):
    """Every argument of Sophia's, by name, as this one has it."""
    arguments = list(inspect.signature(Sophia).parameters)
    left_out = ("model_or_params", "model", "by_position")
    values = {
        name: optimizer.defaults[name] if name in optimizer.defaults else getattr(optimizer, name)
        for name in arguments
        if name not in left_out
    }
    for name in ("estimator", "likelihood"):
        values[name] = (type(values[name]), parts(values[name]))
    return values


def parts(thing):
    """The attributes of an estimator or a likelihood, those of its own parts too."""
    return {
        key: (type(value), parts(value)) if hasattr(value, "__dict__") and not callable(value) else value
        for key, value in vars(thing).items()
    }


def test_the_declared_spaces_hold_what_a_fair_search_needs():
    """Else AdamW would be under-tuned, or Sophia compared with a scale of h that nobody looked for."""
    assert {"lr", "weight_decay", "beta1", "beta2", "warmup"} <= set(table.find("adamw").space)
    for name in ("sophia-g", "sophia-h", "sophia-ef"):
        assert {"lr", "gamma", "eps", "beta2", "warmup", "weight_decay", "update_every", "fraction"} <= set(
            table.find(name).space
        )
