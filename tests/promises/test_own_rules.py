"""The damped and the spectral rule: equations against numpy, who is hidden, corrections, and manners."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from reference import Given, array, give, noise_like, set_curvature
from sophia import Sophia
from sophia.step.hidden_matrices import hidden_matrices
from sophia.step.kernels import damped_blocks
from sophia.step.rules import DAMPED, StepSettings
from sophia.update_rule import corrected_gamma, damped_direction, polar, spectral_direction
from tiny import GPT, data, trained


def svd_direction(u):
    """The spectral step in numpy, by a singular value decomposition in place of the iteration."""

    def whitening(mean):
        return np.maximum(mean / mean.mean(), 1e-6) ** -0.25

    rows, columns = whitening((u**2).mean(1, keepdims=True)), whitening((u**2).mean(0, keepdims=True))
    left, _, right = np.linalg.svd(rows * u * columns, full_matrices=False)
    d = rows * (left @ right) * columns
    return d / np.sqrt((d**2).mean())


def rms(u):
    return math.sqrt((u**2).mean())


def damped(u, h, gamma, damping, size=None, eps=1e-12):
    floor = max(damping * (rms(u) if size is None else size), eps)
    return np.clip(u / np.maximum(gamma * h, floor), -1, 1)


class Block(nn.Module):
    """An embedding, two hidden matrices, a gain, and a head of its own."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(self.embedding(x)).relu())))


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5)])
def test_polar_has_the_singular_vectors_and_values_near_one(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(polar(x), full_matrices=False)
    assert values.min() > 0.88
    assert values.max() < 1.1
    exact = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(left @ torch.diag(values) @ right, polar(x))
    # Same singular vectors: the polar factor in the basis of x is diagonal.
    inside = exact.U.T @ polar(x) @ exact.Vh.T
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), atol=1e-8, rtol=0)


def uneven(shape, seed):
    """Rows and columns of sizes apart by a hundred."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, dtype=torch.float64, generator=generator)
    return torch.logspace(-2, 0, shape[0])[:, None] * u * torch.logspace(0, -2, shape[1])


def test_the_spectral_step_is_that_of_a_decomposition():
    u = uneven((8, 20), seed=1)
    d, exact = array(spectral_direction(u, power=1 / 4)), svd_direction(array(u))
    assert np.sqrt((d**2).mean()) == pytest.approx(1)
    cosine = (d * exact).sum() / np.linalg.norm(d) / np.linalg.norm(exact)
    assert cosine > 0.98  # the iteration leaves singular values within 0.9..1.1, the decomposition at 1


def test_it_is_steepest_for_its_norm():
    """No other step of the same norm in the whitened space has a larger product with the momentum."""
    generator = torch.Generator().manual_seed(2)
    u = uneven((6, 6), seed=2)
    rows = (u.square().mean(1, keepdim=True) / u.square().mean()) ** 0.25
    columns = (u.square().mean(0, keepdim=True) / u.square().mean()) ** 0.25

    def gain(d):
        return float((u * d).sum() / torch.linalg.matrix_norm(rows * d * columns, 2))

    ours = gain(torch.from_numpy(svd_direction(array(u))))
    others = [gain(torch.randn(6, 6, dtype=torch.float64, generator=generator)) for _ in range(200)]
    assert ours > max([*others, gain(u), gain(u.sign()), gain(polar(u))])


def test_rows_that_are_large_in_all_of_the_momentum_move_less():
    u = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    even = spectral_direction(u, power=1 / 4).norm(dim=1)
    u[0] *= 100
    rows = spectral_direction(u, power=1 / 4).norm(dim=1)
    assert rows[0] / rows[1:].mean() < 0.3 * even[0] / even[1:].mean()


def test_the_spectral_rule_keeps_no_more_than_the_momentum_of_hidden_matrices():
    """A second buffer that nothing reads, or a refresh that computes it."""
    model = Block()
    optimizer = Sophia(model, lr=0.01, rule="spectral")
    x = torch.arange(11)[None]
    for _ in range(3):
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        matrix = {"steps", "second_moment", "basis", "basis_squares", "mean_squares"}
        more = (
            set()
            if name in ("up.weight", "down.weight")
            else matrix
            if p.ndim == 2
            else {"steps", "exp_avg_sq"}
        )
        assert set(optimizer.state[p]) == {"exp_avg", *more}
    stats = optimizer.stats()
    assert (stats["has_curvature"], stats["refreshes"], stats["own_rule"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("rule", ["spectral", "whitened"])
def test_a_matrix_that_gets_no_gradient_any_more_stays_finite(rule):
    """An expert that is not asked: what is left of its momentum has squares that are zero in float32, and a
    polar factor that is not one.
    """
    model = Block()
    optimizer = Sophia(model, lr=0.001, rule=rule, mode="manual", update_every=2**30)
    for number in range(900):
        gradients = noise_like(list(model.parameters()), number, scale=float(number < 3))
        give(list(model.parameters()), gradients)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e25])
@pytest.mark.parametrize("shape", [(6, 6), (4, 20)])
def test_directions_do_not_depend_on_the_size_of_the_momentum(size, shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(spectral_direction(size * u, power=1 / 4), spectral_direction(u, power=1 / 4))
    torch.testing.assert_close(polar(size * u), polar(u))


def test_with_what_has_curvature_frozen_nothing_is_refreshed():
    """LoRA on a frozen base: a refresh of nothing, or buffers for all that is frozen."""
    for mode in ("replay", "manual"):
        model = GPT()
        for name, p in model.named_parameters():
            p.requires_grad = name.endswith("qkv.weight")
        groups = [
            {"params": [p for p in model.parameters() if p.requires_grad], "rule": "spectral"},
            {"params": [p for p in model.parameters() if not p.requires_grad]},
        ]
        optimizer = Sophia(groups, lr=0.01, model=model, mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained(model, optimizer, steps=12)
        assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())
        with pytest.raises(RuntimeError, match="nothing that trains here has curvature"):
            optimizer.hessian_pass().__enter__()
        assert optimizer.stats()["refreshes"] == 0


@pytest.mark.parametrize("given", [True, False], ids=["model given", "model found"])
def test_curvature_may_join_late(given):
    """The embeddings unfrozen and added after the hidden matrices: a refresh without a recorded forward."""
    model = GPT()
    hidden = [p for n, p in model.named_parameters() if n.endswith("qkv.weight")]
    optimizer = Sophia(hidden, lr=0.01, rule="spectral", model=model if given else None)
    x, y = data()
    for number in range(14):
        if number == 3:
            others = [p for p in model.parameters() if id(p) not in map(id, hidden)]
            optimizer.add_param_group({"params": others, "rule": "damped"})
        optimizer.zero_grad()
        model(x, y)[1].backward()
        optimizer.step()
    assert optimizer.stats()["refreshes"] > 0
    scales = {(group["rule"], group["scale"]) for group in optimizer.param_groups}
    assert scales >= {("spectral", 0.2), ("damped", 4.0)}


def test_a_rule_with_curvature_that_is_set_late_says_what_to_call():
    model = GPT()
    optimizer = Sophia(model, lr=0.01, rule="whitened")
    x, y = data()
    for group in optimizer.param_groups:
        group["rule"] = "damped"
    model(x, y)[1].backward()
    with pytest.raises(RuntimeError, match=r"call opt.attach\(model\) when a group gets such a rule"):
        optimizer.step()


def test_a_vector_in_a_group_of_the_spectral_rule_is_moved_by_adam():
    """A group by hand that is not split: its gain has no singular values."""
    model = Block()
    groups = [{"params": [model.up.weight, model.norm.weight], "rule": "spectral", "scale": 1.0}]
    optimizer = Sophia(groups, lr=0.01, mode="manual", weight_decay=0.0)
    before = model.norm.weight.detach().clone()
    give([model.up.weight, model.norm.weight], noise_like([model.up.weight, model.norm.weight], 0))
    optimizer.step()
    torch.testing.assert_close((model.norm.weight - before).abs(), 0.01 * torch.ones(6))
    assert set(optimizer.state[model.up.weight]) == {"exp_avg"}


def test_damping_is_a_floor_relative_to_the_tensor():
    u, h = noise_like([torch.zeros(50), torch.zeros(50)], seed=3)
    settings = {"gamma": 0.2, "eps": 1e-12, "damping": 0.5}
    got = array(damped_direction(u, h.abs(), size=u.norm() / u.numel() ** 0.5, **settings))
    np.testing.assert_allclose(got, damped(array(u), array(h.abs()), 0.2, 0.5), rtol=1e-5)
    size = torch.tensor(1e-6 * rms(array(u)))
    scaled = damped_direction(1e-6 * u, 1e-6 * h.abs(), size=size, **settings)
    np.testing.assert_allclose(array(scaled), got, rtol=1e-4)
    published = damped_direction(u, h.abs(), size=size, **{**settings, "damping": 0.0})
    np.testing.assert_allclose(
        array(published), np.clip(array(u) / np.maximum(0.2 * array(h.abs()), 1e-12), -1, 1), rtol=1e-5
    )


@pytest.mark.parametrize("rule", ["damped", "spectral"])
def test_ten_steps_against_numpy(rule):
    torch.manual_seed(0)
    model = Block().double()
    before = {name: array(p) for name, p in model.named_parameters()}
    curved = rule == "damped"
    given = {"estimator": Given(), "update_every": 4} if curved else {}
    optimizer = Sophia(model, lr=0.01, rule=rule, mode="manual", weight_decay=0.1, **given)
    beta1, beta2, gamma, damping = 0.9, 0.9, 0.2, 0.5
    named = dict(model.named_parameters())
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in named.items()}
    m = {name: np.zeros_like(value) for name, value in before.items()}
    h = {name: np.zeros_like(value) for name, value in before.items()}
    theta, refreshes, sizes = dict(before), 0, {}
    for step in range(10):
        if curved and step % 4 == 0:
            diagonals = [d.abs() for d in noise_like(order, 100 + step)]
            set_curvature(optimizer, diagonals)
            refreshes += 1
            for p, d in zip(order, diagonals, strict=True):
                h[names[id(p)]] = beta2 * h[names[id(p)]] + (1 - beta2) * array(d)
        gradients = noise_like(order, step)
        give(order, gradients)
        optimizer.step()
        for p, g in zip(order, gradients, strict=True):
            name, g = names[id(p)], array(g)
            hidden = name in ("up.weight", "down.weight")
            if not curved and not hidden:
                continue  # by the factored rule, which test_second_moments.py has
            m[name] = beta1 * m[name] + (1 - beta1) * g
            # Nesterov's look-ahead, corrected as the average of one step more; h as an average of refreshes.
            u = (beta1 * m[name] + (1 - beta1) * g) / (1 - beta1 ** (step + 2))
            if rule == "spectral":
                direction = 0.2 * array(spectral_direction(torch.from_numpy(u), power=1 / 4))
            else:
                # The floor is by the step before.
                part, curvature = 0.1 if hidden else 4.0, h[name] / (1 - beta2**refreshes)
                direction = part * damped(u, curvature, gamma, damping, sizes.get(name))
                sizes[name] = rms(u)
            decay = 0.0 if before[name].ndim < 2 else 0.1
            theta[name] = theta[name] * (1 - 0.01 * decay) - 0.01 * direction
    for name, p in named.items():
        if not curved and name not in ("up.weight", "down.weight"):
            continue
        np.testing.assert_allclose(array(p), theta[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_who_is_hidden():
    for tied in (False, True):
        model = Block(tied)
        assert hidden_matrices(model) == {id(model.up.weight), id(model.down.weight)}
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    hidden = hidden_matrices(model)
    inner = {name for name, p in model.named_parameters() if id(p) in hidden}
    assert inner == {name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}


def test_hidden_tensors_that_are_no_matrices_move_as_far_as_the_matrices():
    """A kernel or a stack of experts at the rate of an embedding, forty times too far."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Conv1d(3, 4, 2)
            self.experts = nn.Parameter(torch.zeros(2, 4, 4))
            self.inner, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)

    model = Stacked()
    for rule, other, hidden, rest in (("damped", "damped", 0.1, 4.0), ("spectral", "factored", 0.05, 1.0)):
        optimizer = Sophia(model, rule=rule)
        found = {id(p): (g["rule"], g["scale"]) for g in optimizer.param_groups for p in g["params"]}
        assert found[id(model.inner.weight)] == (rule, 0.1 if rule == "damped" else 0.2)
        assert {found[id(p)] for p in (model.kernel.weight, model.experts)} == {(other, hidden)}
        assert {found[id(p)] for p in (model.kernel.bias, model.head.weight)} == {(other, rest)}


def test_groups_of_the_user_are_split_and_keep_their_settings():
    model = Block()
    pair = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.3, "lr": 0.02},
        {"params": [model.norm.weight], "rule": "paper", "gamma": 0.05},
    ]
    optimizer = Sophia(pair, model=model, rule="spectral", lr=0.01)
    found = [
        (g["rule"], g["scale"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups
    ]
    assert found == [
        ("spectral", 0.2, 0.02, 0.3, 2),
        ("factored", 1.0, 0.02, 0.3, 2),
        ("paper", 1.0, 0.01, 0.1, 1),
    ]
    named = Sophia(model.named_parameters(), model=model, rule="spectral")
    assert named.param_groups[0]["param_names"] == ["up.weight", "down.weight"]


def test_a_schedule_that_writes_one_lr_into_all_groups_keeps_the_proportion():
    model = Block()
    optimizer = Sophia(model, rule="damped", mode="manual", estimator=Given(), weight_decay=0.0)
    set_curvature(optimizer, [1e-9 * torch.ones_like(p) for g in optimizer.param_groups for p in g["params"]])
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {name: float((before[name] - value).abs().max()) for name, value in model.state_dict().items()}
    assert moved["embedding.weight"] == pytest.approx(2.0)
    assert moved["up.weight"] == pytest.approx(0.05)


def test_the_correction_is_the_usual_one():
    torch.manual_seed(0)
    m, h, betas = torch.rand(9), torch.rand(9), (0.9, 0.8)
    u_hat, h_hat = m / (1 - 0.9**4), h / (1 - 0.8**2)
    plain = (u_hat / (0.2 * h_hat)).clamp(-1, 1)
    gamma = corrected_gamma(0.2, betas=betas, step=3, refreshes=2)
    torch.testing.assert_close((m / (gamma * h)).clamp(-1, 1), plain)
    assert corrected_gamma(0.2, betas=betas, step=1, refreshes=0) == 0.2


@pytest.mark.parametrize("rule", ["damped", "spectral"])
def test_a_real_model_learns_and_resumes_bit_for_bit(rule):
    def data(step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(11, (8, 5), generator=generator)
        return x, (x * 3 + 1) % 11

    def train(model, optimizer, steps):
        for step in steps:
            x, y = data(step)
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    torch.manual_seed(0)
    model = Block()
    optimizer = Sophia(model, lr=0.02, rule=rule, update_every=5)
    first = train(model, optimizer, range(1))
    train(model, optimizer, range(1, 13))
    again = copy.deepcopy(model)
    resumed = Sophia(again, lr=0.02, rule=rule, update_every=5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    last = train(model, optimizer, range(13, 60))
    train(again, resumed, range(13, 60))
    assert last < 0.5 * first
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def estimator_of(rule):
    return {"estimator": Given(lambda p: 1e-9 * torch.ones_like(p))} if rule == "damped" else {}


@pytest.mark.parametrize("rule", ["damped", "spectral"])
def test_still_where_there_is_no_gradient(rule):
    model = Block()
    optimizer = Sophia(model, lr=0.1, rule=rule, mode="manual", weight_decay=0.0, **estimator_of(rule))
    if rule == "damped":
        ones = [1e-9 * torch.ones_like(p) for g in optimizer.param_groups for p in g["params"]]
        set_curvature(optimizer, ones)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("rule", ["damped", "spectral"])
def test_maximize_mirrors_and_half_precision_follows(rule):
    torch.manual_seed(0)
    models = [Block() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    models[2].to(torch.bfloat16)
    made = [
        Sophia(
            m,
            lr=0.01,
            rule=rule,
            mode="manual",
            weight_decay=0.0,
            maximize=up,
            **estimator_of(rule),
        )
        for m, up in zip(models, (False, True, False), strict=True)
    ]
    start = [p.detach().clone() for p in models[0].parameters()]
    for model, optimizer in zip(models, made, strict=True):
        parameters = list(model.parameters())
        give(parameters, noise_like(parameters, 5))
        if rule == "damped":
            with optimizer.hessian_pass():
                pass
        optimizer.step()
    for p, down, up, half in zip(start, *(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p - down, up - p, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(down, half.float(), atol=0.03, rtol=0.03)


def test_what_cannot_be_meant():
    model = Block()
    with pytest.raises(
        ValueError, match="rule='newton' is unknown: give one of 'paper', 'damped', 'spectral'"
    ):
        Sophia(model, rule="newton")
    with pytest.raises(ValueError, match="by the model"):
        Sophia(model.parameters(), rule="spectral", mode="manual")
    with pytest.raises(ValueError, match="damping"):
        Sophia(model, rule="damped", damping=-1.0)
    with pytest.raises(ValueError, match=r"scale=0\.5 with rule='paper'"):
        Sophia([{"params": model.parameters(), "scale": 0.5}], model=model)


def test_blocks_equal_the_rule_in_any_dense_layout():
    torch.manual_seed(0)
    shape = (300, 700)  # more than one block, the last of them short
    for layout in (torch.zeros(shape), torch.zeros(shape[::-1]).T, torch.zeros(2, *shape)[1]):
        pair = [layout.clone(memory_format=torch.preserve_format) for _ in range(4)]
        for tensor, scale in zip(pair, (1.0, 1e-3, 1e-3, 1e-2), strict=True):
            tensor.copy_(torch.randn(shape) * scale)
        settings = {"lr": 0.1, "beta1": 0.9, "gamma": 0.2, "eps": 1e-12, "damping": 0.5, "scale": 0.3}
        given = StepSettings(DAMPED, **settings, weight_decay=0.1)
        fast = [[t.clone(memory_format=torch.preserve_format)] for t in pair]
        assert damped_blocks.applies(*(column[0] for column in fast))
        damped_blocks.step(*fast, given, sizes=[torch.zeros(())])
        p, g, m, h = (array(t) for t in pair)
        m = 0.9 * m + 0.1 * g
        p = p * (1 - 0.1 * 0.1) - 0.1 * 0.3 * damped(0.9 * m + 0.1 * g, h, 0.2, 0.5)
        np.testing.assert_allclose(array(fast[0][0]), p, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(array(fast[2][0]), m, rtol=1e-5, atol=1e-9)
