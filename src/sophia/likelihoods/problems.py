"""What a loss seems to be where its gradient is not that of the likelihood: a table of causes, one small
function each.

Asked in order; the first that recognises the gradient names the cause and what to write instead. A cause is
``Evidence -> Problem or None``: add yours to ``CAUSES``, before the general ones at its end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sophia.likelihoods.comparisons import in_pieces, of_pieces
from sophia.likelihoods.evidence import BALANCE, Evidence
from sophia.likelihoods.lines import SMALLEST, TOLERANCE
from sophia.likelihoods.misfit import Problem
from sophia.likelihoods.sampling import fine

__all__ = [
    "CAUSES",
    "Problem",
    "elsewhere",
    "find_problem",
    "of_own_probability",
    "one_column",
    "signs",
    "two_classes",
    "unread_soft_targets",
]

_BY_HAND = "mode='manual' with opt.hessian_pass()"
_MARGINS = (
    "the prediction is the margin of a pair: likelihood='bernoulli' with a module that returns it, or "
    f"{_BY_HAND} and hp.sampled_loss(margin)"
)
_SIMILARITIES = "pass logits_fn=, a function from the output to the similarities that cross_entropy gets"


def find_problem(evidence: Evidence) -> Problem | None:
    """The first cause that recognises the gradient; None for that of a cross-entropy with soft targets."""
    return next((found for cause in CAUSES if (found := cause(evidence)) is not None), None)


# ---- causes that are known without the gradient, or from weights that could be read ----


def one_column() -> Problem:
    """Of an output with a single class."""
    return Problem(
        "one column",
        "the output has one column, and a softmax over one class is always 1 and has no curvature",
        "Give likelihood='bernoulli' for yes-or-no answers (BCEWithLogitsLoss), 'gaussian' for numbers "
        "(MSELoss), 'poisson' for counts; for scores that are compared in pairs (a reward model) 'bernoulli' "
        "with logits_fn=lambda output: torch.sub(*output.chunk(2)), chosen rows first",
        nonsense=True,
    )


def elsewhere(dim: int) -> Problem:
    """Of classes that lie in another dimension than the last."""
    return Problem(
        "elsewhere",
        f"it sums to zero over dimension {dim} of the output and not over the last one, so the classes lie "
        f"in dimension {dim}, as in cross_entropy of (N, C, H, W) in segmentation",
        f"Pass logits_fn=lambda output: output.movedim({dim}, -1); where outputs are resized before the "
        "loss, resize them in logits_fn too",
        nonsense=True,
    )


def two_classes(lowest: float, highest: float) -> Problem:
    """Of weights of two classes that soft targets would look like."""
    return Problem(
        "two classes",
        "of two classes soft targets (mixup with its own share for each example, a teacher) and weights of "
        f"the predictions look the same; with hard labels these would lie between {lowest:.2g} and "
        f"{highest:.2g} of a mean's",
        "h takes the labels for hard and these for the weights. If targets are soft, let the model return "
        "the difference of its two outputs, with binary_cross_entropy_with_logits and "
        "likelihood='bernoulli', or use estimator='hutchinson'",
    )


def signs(negative: float) -> Problem:
    """Of weights of which this share is below zero."""
    if negative > 0.9:
        return Problem(
            "signs",
            f"{negative:.0%} of its predictions have a negative weight: it is minus a cross-entropy "
            "(a gradient to be ascended, unlikelihood, the rejected text of a pair), which has no "
            "Gauss-Newton curvature",
            "If it is a log-likelihood that you mean to maximise, pass maximize=True; for preference pairs "
            f"{_MARGINS}; else use {_BY_HAND}, or estimator='hutchinson'",
            nonsense=True,
        )
    return Problem(
        "signs",
        f"{negative:.0%} of its predictions have a negative weight (advantages of both signs, a pair of "
        "losses with a minus between them as in preference losses, unlikelihood): such a loss is no "
        "likelihood and has no Gauss-Newton curvature",
        f"For preference pairs {_MARGINS}. For advantages: {_BY_HAND} and "
        "hp.sampled_loss(logits, mask) gives the curvature of the policy (Fisher), hp.add(loss, count) with "
        "estimator='hutchinson' that of the loss",
    )


def of_own_probability(flat: Tensor, p: Tensor, weights: Tensor, rows: Tensor) -> Problem | None:
    """Weights that are a smooth function of the label's own probability: a focal loss and its like."""
    some = rows[:: max(1, len(rows) // 64)][:64]
    w = weights[some].to(fine(weights))
    # The label's gradient, w (p - 1), is the lowest.
    own = 1 + flat[some].amin(1).to(w.dtype) / w.clamp(min=1e-38)
    usable = (w > 1e-6 * w.max()) & (own > 0) & (own < 1)
    w, own = w[usable], own[usable]
    if (
        len(w) < 8
        or len(torch.unique((own * 1e3).round())) < 8
        or len(torch.unique((w / w.max() * 1e3).round())) < 6
    ):
        return None
    powers = torch.stack([own**i for i in range(4)], 1)
    factors = torch.linalg.lstsq(powers.cpu(), w.cpu()[:, None]).solution.to(own.device)
    rest = (w - (powers @ factors)[:, 0]).square().sum()
    if float(rest) > 1e-3 * float((w - w.mean()).square().sum()):
        return None
    # With F(-log own) as the loss, w = F', and F'' (p - e) (p - e)^T stands beside F' (diag p - p p^T).
    slope = (torch.stack([i * own ** max(0, i - 1) for i in range(4)], 1) @ factors)[:, 0]
    other = (-own * slope * (1 - own).square()).sum()
    left_out = float(other.abs() / (w * (1 - own.square())).sum().clamp(min=1e-38))
    return Problem(
        "of own probability",
        "it is that of a cross-entropy whose weights follow the probability of the prediction's own label, "
        f"from {float(w.min() / w.max()):.2g} to 1 (a focal loss, -p, and their like). h takes them for "
        f"constants, and is off by about {left_out:.0%} of the curvature",
        "To have all of it, derive a likelihood from sophia.likelihoods.Categorical, or use "
        "estimator='hutchinson'",
    )


def unread_soft_targets(least: float) -> Problem:
    """Of soft targets in every class, and a lower bound of their weight that contradicts a mean."""
    return Problem(
        "unread soft targets",
        "it sums to zero over the classes as that of a cross-entropy with soft targets does, but no weight "
        f"fits ({least:.2g} of a mean's, at least, somewhere). Soft targets of a teacher that excludes no "
        "class leave the weight open; a softmax of the outputs divided by a temperature (distillation), or "
        "of outputs to which something was added, looks the same",
        "For a teacher at a temperature T give likelihood=Distillation(T, hard=..., soft=...) from "
        "sophia.likelihoods, with the factors of the two parts of the loss; for other losses use "
        "estimator='hutchinson'",
    )


# ---- causes by the gradient ----


def losses(e: Evidence) -> Problem | None:
    """Outputs that are losses already: more of each is more of the whole."""
    if bool((e.gradient < 0).any()) or bool((e.outputs < 0).any()) or not bool((e.gradient > 0).any()):
        return None
    return Problem(
        "losses",
        "it is positive everywhere, so the output is a loss already, one for each example, row or prediction "
        "(reduction='none' in the model)",
        "Return the logits and take the loss outside, or pass logits_fn=, a function from the output to "
        "them; estimator='hutchinson' needs nothing but the mean loss",
        nonsense=True,
    )


def probabilities(e: Evidence) -> Problem | None:
    """Outputs that have been through a softmax."""
    z = e.outputs
    if z.shape[1] < 2 or bool((z < 0).any()) or bool(((z.sum(1) - 1).abs() > 1e-2).any()) or e.balanced():
        return None
    return Problem(
        "probabilities",
        "the outputs sum to 1: they are probabilities, and not the logits of a softmax",
        "Pass logits_fn=lambda output: output.log(), or let the model return logits (or log_softmax) and "
        "train with cross_entropy (or nll_loss)",
        nonsense=True,
    )


def temperature(e: Evidence) -> Problem | None:
    """A cross-entropy of ``outputs / T``: the gradient's logarithm is a line in log p."""
    positive = (e.g > 4 * SMALLEST.get(e.dtype, 0.0)) & (e.p > 0)
    if int(positive.sum(1).median()) < 3:
        return None
    x, y = (each.clamp(min=1e-30).log().masked_fill(~positive, torch.nan) for each in (e.p, e.g))
    dx, dy = x - x.nanmean(1, keepdim=True), y - y.nanmean(1, keepdim=True)
    slopes = (dx * dy).nansum(1) / dx.square().nansum(1).clamp(min=1e-30)
    slope = float(slopes.median())
    rest = (dy - slopes[:, None] * dx).abs().nan_to_num(0.0).amax(1).median()
    # Near equal probabilities everything smooth is nearly a line.
    bound = TOLERANCE.get(e.dtype, 1e-3) * max(0.3, float(dy.abs().nan_to_num(0.0).amax(1).median()))
    if not (float(rest) < bound and abs(slope - 1) > 0.02 and slope > 0):
        return None
    return Problem(
        "temperature",
        f"it is a cross-entropy of the outputs divided by {1 / slope:.3g}, a temperature outside the model",
        f"Pass logits_fn=, a function from the output to the logits / {1 / slope:.3g}",
    )


def yes_or_no(e: Evidence) -> Problem | None:
    """A binary cross-entropy in each class: ``w (sigmoid(z) - y)``."""
    p = torch.sigmoid(e.z)
    counts = (e.g != 0) & (p > 1e-3) & (p < 1 - 1e-3)
    each = torch.where(e.g > 0, e.g / p, -e.g / (1 - p))[counts]
    if len(each) < 8 or bool((e.g[counts] > 0).all()):
        return None
    middle = each.median()
    near = (each - middle).abs() <= 3 * TOLERANCE.get(e.dtype, 1e-3) * middle
    if float(near.float().mean()) < 0.9:
        return None
    return Problem(
        "yes or no",
        "it is that of a binary cross-entropy in each class",
        "Give likelihood='bernoulli'",
        nonsense=True,
    )


def normalised(e: Evidence) -> Problem | None:
    """Outputs whose length does not matter: the gradient is at right angles to them."""
    g, z = e.gradient, e.outputs
    lengths = g.norm(dim=1) * z.norm(dim=1)
    cosines = ((g * z).sum(1).abs() / lengths.clamp(min=1e-38))[lengths > 0]
    # Over few dimensions right angles are common.
    if e.balanced() or len(cosines) < 4 or float(cosines.median()) > 3 * BALANCE.get(e.dtype, 1e-4):
        return None
    return Problem(
        "normalised",
        "it is at right angles to the outputs, whose length does not matter to it: they are embeddings that "
        "the loss normalises, as a contrast between pairs does, and not the logits",
        f"If one forward returns both sides, {_SIMILARITIES}; if there are several, use {_BY_HAND} and "
        "hp.sampled_loss(similarities), once for each direction. For a triplet or another loss of distances "
        "use estimator='hutchinson'",
        nonsense=True,
    )


def margin(e: Evidence) -> Problem | None:
    """Classes that count alike whatever their probability: a hinge."""
    kept = e.g.argsort(1)[:, 1:]
    g, p = e.g.gather(1, kept), e.p.gather(1, kept)
    if g.shape[1] < 2:
        return None
    size = g.amax(1, keepdim=True)
    steps = (g.abs() <= 1e-5 * size) | ((g - size).abs() <= 1e-5 * size)
    told = (p.amax(1) > 1.05 * p.amin(1)) & (size[:, 0] > 0)
    several = ((g - size).abs() <= 1e-5 * size).sum(1) >= 2
    if not bool(several.any()) or float(steps.all(1)[told].float().mean()) < 0.9:
        return None
    return Problem(
        "margin",
        "it is the same for all classes within a margin, whatever their probability (a hinge): such a loss "
        "is made of straight pieces and has no curvature, and a cross-entropy's would stand in its place",
        f"Use cross_entropy, or an optimizer without curvature; or {_BY_HAND}",
    )


def pieces(e: Evidence) -> Problem | None:
    """Numbers with straight pieces for losses: quantiles, absolute errors."""
    counted = e.gradient != 0
    if e.balanced() or not in_pieces(e.gradient[counted], e.outputs[counted], e.dtype):
        return None
    return of_pieces("mean or weighted cross-entropy")


def almost(e: Evidence) -> Problem | None:
    """A cross-entropy with something beside it."""
    part = e.off_line()
    if e.balanced() or e.imbalance() > 0.3 or part > 0.3:
        return None
    return Problem(
        "almost",
        f"it is that of a cross-entropy but for {max(part, 0.01):.0%} of its size (a second term on the "
        "outputs?)",
        "h leaves that term out. Make it small, or use estimator='hutchinson' for the whole loss",
    )


def another_softmax(e: Evidence) -> Problem | None:
    """One label a prediction, and probabilities that are not those of the outputs."""
    if e.whole.shape[1] < 4 or not e.balanced() or not bool(((e.whole < 0).sum(1) == 1).all()):
        return None
    return Problem(
        "another softmax",
        "it has one label a prediction, as a cross-entropy has, but its softmax is not that of the outputs: "
        f"{e.off_line():.0%} of it is no multiple of theirs (something is added to them or divided outside "
        "of the model, or a second term, an entropy for instance, stands beside the cross-entropy)",
        "Pass logits_fn=, a function from the output to the logits that cross_entropy gets; for a second "
        f"term use estimator='hutchinson' or {_BY_HAND}",
    )


def no_logits(e: Evidence) -> Problem | None:
    """Anything that is not the logits of a softmax."""
    if e.balanced():
        return None
    return Problem(
        "no logits",
        f"over the classes it sums to {e.sum_of_size()} instead of 0, so the output is not the logits of a "
        "cross-entropy: hidden states or embeddings, of which the loss makes the logits; or the loss is "
        "another one",
        "Pass logits_fn=, a function from the output to the logits (logits_fn=lambda hidden: "
        "model.head(hidden)); for a squared error give likelihood='gaussian', for the margin of a pair "
        "'bernoulli', for other losses theirs. Where outputs of several forwards meet in the loss, or one is "
        f"fed back into the model, use {_BY_HAND}, and hp.sampled_loss(logits) for a contrast; for distances "
        "(a triplet loss) estimator='hutchinson'",
        nonsense=True,
    )


CAUSES: tuple[Callable[[Evidence], Problem | None], ...] = (
    losses,
    probabilities,
    yes_or_no,
    temperature,
    margin,
    pieces,
    another_softmax,
    # the general ones
    normalised,
    almost,
    no_logits,
)
