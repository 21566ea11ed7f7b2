"""Products against explicit matrices, the expansion against the loss, curves and verdicts as planted."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.curvature.exact import gauss_newton_diagonal
from sophia.lab.experiments.framework import small_language_model
from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.sharpness import along_a_step, experiment, matched_loss
from sophia.likelihoods import Categorical


@pytest.fixture(scope="module")
def case():
    """The tiny model in float64 after some training, letters, and a step of every parameter."""
    model = small_language_model.tiny(True, steps=30)
    generator = torch.Generator().manual_seed(3)
    ids = small_language_model.windows(small_language_model.letters(True), 3, 8, generator)
    d = [1e-2 * torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in model.parameters()]
    return model, ids, d


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def rows(outputs, parameters):
    """The derivative of each output, a row each."""
    return torch.stack(
        [
            flat(torch.autograd.grad(y, parameters, retain_graph=True, materialize_grads=True))
            for y in outputs.reshape(-1)
        ]
    )


def test_products_are_those_of_the_explicit_hessian(case):
    """Curvature of another function or along another step; parts that do not belong to the whole."""
    model, ids, d = case
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters, create_graph=True)
    matrix, step = rows(flat(g), parameters), flat(d)
    torch.testing.assert_close(matrix, matrix.T)
    of = along_a_step.parts(model)
    before = [p.detach().clone() for p in parameters]
    found = along_a_step.expand(model, ids, before, [a + b for a, b in zip(before, d, strict=True)], of)
    assert found.gain == pytest.approx(-float(flat(g).detach() @ step))
    assert found.hessian == pytest.approx(float(step @ matrix @ step))
    ends = torch.tensor([p.numel() for p in parameters]).cumsum(0).tolist()
    blocks = [slice(end - p.numel(), end) for end, p in zip(ends, parameters, strict=True)]
    form = lambda one, other: float(
        step[blocks[one]] @ matrix[blocks[one], blocks[other]] @ step[blocks[other]]
    )
    sums = [sum(form(i, j) for i in one for j in one) for one in of.values()]
    assert found.within == pytest.approx(sums)
    between = sum(
        form(i, j)
        for k, one in enumerate(of.values())
        for m, other in enumerate(of.values())
        if k != m
        for i in one
        for j in other
    )
    assert sum(found.within) + between == pytest.approx(found.hessian)
    for name, value in zip(along_a_step.KINDS, found.kinds, strict=True):
        some = [i for part, places in of.items() if along_a_step.kind(part) == name for i in places]
        assert value == pytest.approx(sum(form(i, j) for i in some for j in some))
    assert sum(found.squared) == pytest.approx(float(step @ step))
    assert sum(found.weights) == pytest.approx(float(flat(before) @ flat(before)))


def test_parts_are_every_matrix_and_all_vectors(case):
    """A parameter in no part or in two; a bias counted as a matrix."""
    model, _, _ = case
    names, of = [name for name, _ in model.named_parameters()], along_a_step.parts(model)
    assert sorted(i for places in of.values() for i in places) == list(range(len(names)))
    assert all(p.ndim == 1 for p in map(list(model.parameters()).__getitem__, of["vectors"]))
    kinds = {part: along_a_step.kind(part) for part in of}
    assert [part for part, k in kinds.items() if k == "table"] == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ]
    assert sum(k == "hidden" for k in kinds.values()) == 4


def test_gauss_newton_is_that_of_the_explicit_matrix(case):
    """A product with another matrix. Jacobians of the logits by backward, not by forward mode; and the
    diagonal is that of the oracle which the estimators are held to.
    """
    model, ids, d = case
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(input_ids=ids).logits[:, :-1]
    jacobian = rows(logits, parameters).unflatten(0, (-1, logits.shape[-1]))
    p = logits.detach().softmax(-1).flatten(0, 1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("bvi,bvw,bwj->ij", jacobian, middle, jacobian) / len(p)
    step = flat(d)
    assert along_a_step.gauss_newton(model, ids, d) == pytest.approx(float(step @ matrix @ step))

    def function(weights):
        return torch.func.functional_call(model, weights, (), {"input_ids": ids}).logits[:, :-1]

    with sdpa_kernel(SDPBackend.MATH):
        diagonal = gauss_newton_diagonal(function, dict(model.named_parameters()), likelihood=Categorical())
    torch.testing.assert_close(matrix.diagonal(), flat(diagonal.values()))


def test_the_expansion_is_that_of_the_true_change(case):
    """Loss and derivatives at different weights. What is missed is of third order: a half, an eighth."""
    model, ids, d = case
    before, of = [p.detach().clone() for p in model.parameters()], along_a_step.parts(model)
    missed = []
    for length in (1.0, 0.5):
        after = [a + length * b for a, b in zip(before, d, strict=True)]
        found = along_a_step.expand(model, ids, before, after, of)
        missed.append(found.change + found.gain - found.hessian / 2)
        assert abs(missed[-1]) < 0.1 * abs(found.change)
    assert missed[0] / missed[1] == pytest.approx(8, rel=0.15)
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)  # left at the start of the step


def test_a_step_is_all_that_the_weights_did():
    """Steps looked at that are others, or weights that a training with no one looking would not have had."""
    from sophia.lab.experiments.framework.progress import Progress
    from sophia.lab.models import build

    found = experiment._along("adamw-apart", 1, True, Progress())
    shape, source = small_language_model.shape(True), small_language_model.text(True)
    model, weights = build.gpt2(shape, seed=1), []
    for _ in small_language_model.training(
        model,
        "adamw-apart",
        experiment.CONTENDERS["adamw-apart"],
        source,
        steps=8,
        batch=4,
        context=shape.context,
        seed=1,
    ):
        weights.append(flat([p.detach().clone() for p in model.parameters()]).double())
    assert [p["step"] for p in found["points"]] == [1, 3, 5, 7]
    for point in found["points"]:
        step = weights[point["step"] + 1] - weights[point["step"]]
        assert sum(point["squared"]) == pytest.approx(float(step @ step), rel=1e-5)
        assert sum(point["weights"]) == pytest.approx(float(weights[point["step"]].square().sum()), rel=1e-5)


def plant(folder, sharpness, *, seeds=(1, 2), fall=None):
    """Records in which the curvature along steps is so many times the loss, by contender and seed; each falls
    by its own ``fall`` a point, so that equal steps are unequal losses.
    """
    records = Records(folder)
    fall = fall or {}
    for seed in seeds:
        for contender, factor in sharpness.items():
            points = []
            for step in range(6):
                loss = 8.0 - fall.get(contender, 0.5) * step
                along = (factor[seed - 1] if isinstance(factor, tuple) else factor) * loss
                points.append(
                    {
                        "step": step,
                        "loss": loss,
                        "gain": 2.0,
                        "hessian": 2 * along,
                        "change": along - 2.0,
                        "gauss_newton": 4 * along,
                        "within": [along, 0.25 * along],
                        "squared": [1.5, 0.5],
                        "kinds": [along, 0.5 * along, 0.0],
                        "weights": [1.0, 1.0],
                    }
                )
            parts = ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"]
            records.add({"contender": contender, "seed": seed}, parts=parts, points=points)
    return records


def test_comparison_is_at_the_same_loss_and_not_at_the_same_step(tmp_path):
    """A faster optimizer called flatter because it is further. Curvature equal at equal loss, at six steps
    of unequal falls.
    """
    records = plant(tmp_path, {"adamw": 1.0, "muon": 1.0}, fall={"muon": 0.8})
    for ours, base in matched_loss.compared(records, "muon", "d'Hd / |d|^2"):
        assert ours == pytest.approx(base)
        assert base == pytest.approx((8.0 + 5.5) / 2)  # straight lines, and the losses that both pass
    (pair, _) = matched_loss.compared(records, "muon", "the same of hidden matrices")
    assert pair[1] == pytest.approx(0.5 * 6.75 / 0.5)
    (pair, _) = matched_loss.compared(records, "muon", "gain of the best length")
    assert pair[0] == pytest.approx(4 / 8 / 6.75, rel=0.01)
    apart = plant(tmp_path / "apart", {"adamw": 1.0, "muon": 1.0}, fall={"adamw": 0.0, "muon": 0.8})
    assert matched_loss.compared(apart, "muon", "d'Hd / |d|^2") == []


def test_one_step_into_a_fold_of_the_loss_is_no_curvature_of_the_rest(tmp_path):
    """A mean over losses that is of one step alone, whose curvature is a hundred times the others'."""
    records = plant(tmp_path, {"adamw": 1.0, "muon": 0.5})
    quiet = matched_loss.compared(records, "muon", "d'Hd / |d|^2")
    for row in records.where(contender="adamw"):
        row.result["points"][2]["hessian"] = -500.0
    for (ours, base), before in zip(
        matched_loss.compared(records, "muon", "d'Hd / |d|^2"), quiet, strict=True
    ):
        assert ours == before[0]
        assert base == pytest.approx(before[1], rel=0.2)


@pytest.mark.parametrize(
    ("ours", "muon", "word"),
    [
        (0.5, 0.5, "holds"),
        (0.5, 2.0, "holds in part"),
        (2.0, 0.5, "holds in part"),
        (2.0, 2.0, "contradicted"),
        ((0.5, 2.0), 2.0, "not seen at this scale"),
        ((2.0, 0.5), (0.5, 2.0), "not seen at this scale"),
    ],
)
def test_the_verdict_is_that_of_what_was_planted(tmp_path, ours, muon, word):
    """A verdict from one seed of two, or with the sign turned."""
    records = plant(tmp_path, {"adamw": 1.0, "muon": muon, "sophia-g": ours}, fall={"muon": 0.7})
    said = experiment.verdict(records)
    assert said.word == word
    first = muon if isinstance(muon, tuple) else (muon, muon)
    assert f"muon {first[0]:.2g} and {first[1]:.2g}" in said.sentence
    assert "Within tensors lies 62% (adamw)" in said.sentence
    assert "misses the true change of the loss by 0% of the first-order gain" in said.sentence
    experiment.draw(records)


def test_a_run_that_was_lost_is_left_out_and_said(tmp_path):
    """Numbers from beyond a divergence, or a crash at the end of all runs."""
    records = plant(tmp_path, {"adamw": 1.0, "muon": 0.5, "sophia-g": 0.5})
    for row in records.rows:
        if row.case["contender"] == "sophia-g":
            for point in row.result["points"][1:]:
                point["hessian"] = None
    said = experiment.verdict(records)
    assert said.word == "holds in part"
    assert "No loss was passed by both adamw and sophia-g." in said.sentence
    experiment.draw(records)
