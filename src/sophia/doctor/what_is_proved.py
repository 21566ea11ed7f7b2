"""The account of a refresh, in sentences: what was found in the model, what was proved, what is assumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from sophia.doctor.findings import Finding
from sophia.refresh.account import Account, OfOutput, OfRepetition

__all__ = ["of_account", "of_outputs"]

_LOSS = {
    "Categorical": "cross-entropy",
    "Bernoulli": "binary cross-entropy",
    "Gaussian": "squared error",
    "Poisson": "Poisson loss",
}
_OPEN = {
    "Categorical": "it has soft targets in every class, or nothing but rounding is left of it: there is no "
    "line to hold it to",
    "Bernoulli": "with some weight of each answer any gradient is one, so there is nothing to hold it to",
    "Gaussian": "with some targets any gradient is one, so there is nothing to hold it to",
    "Poisson": "its targets come out as whole numbers with no one weight",
}


def of_account(account: Account) -> Iterator[Finding]:
    """All that a refresh has found."""
    yield from of_outputs(account.outputs, needed=account.needs_outputs)
    yield _rows(account)
    yield from _repetition(account.repetition)
    yield _scale(account.gradient_scale)


def of_outputs(outputs: Sequence[OfOutput], *, needed: bool = True) -> Iterator[Finding]:
    """Which outputs count, as what, and what their predictions weigh.

    Args:
        outputs: of one step.
        needed: whether labels are drawn from them; else they only say how many predictions there are.
    """
    for output in outputs:
        yield _output(output)
    if not needed:
        yield Finding(
            "loss", "ok", "no likelihood is needed: this estimator takes the loss as the model returns it"
        )
        return
    used = [output for output in outputs if output.known_by == "gradient" and output.counted]
    for head in dict.fromkeys(output.head for output in used):
        of_head = [output for output in used if output.head == head]
        yield _likelihood(of_head)
        yield from _weights(of_head)


def _output(output: OfOutput) -> Finding:
    what = f"{output.name} of shape {output.shape}"
    if output.joined:
        what += ", joined, as the loss uses it too"
    data = {
        "head": output.head,
        "shape": list(output.shape),
        "counted": output.counted,
        "predictions": output.predictions,
        "joined": output.joined,
        "known_by": output.known_by,
    }
    count = f"{output.counted} of {output.predictions} predictions count"
    if output.known_by == "gradient":
        return Finding("outputs", "ok", f"{what}: {count}, by the gradient of the loss", data)
    if output.known_by == "mask_fn":
        return Finding("outputs", "ok", f"{what}: {count}, by mask_fn", data)
    if output.known_by == "left out":
        return Finding("outputs", "note", f"{what}: the loss of this step left it out", data)
    no = (
        "no gradient of the loss reaches this tensor (compiled with the loss inside? built by logits_fn?), so"
    )
    if output.known_by == "labels":
        return Finding("outputs", "note", f"{what}: {no} what counts is read from the labels", data)
    return Finding("outputs", "note", f"{what}: {no} every position counts. mask_fn= says which do", data)


def _likelihood(outputs: Sequence[OfOutput]) -> Finding:
    """How well the gradient fits the loss of one head's likelihood."""
    name, kind = _named(outputs), outputs[0].likelihood
    loss, fits = _LOSS.get(kind), [output.fit for output in outputs if output.fit is not None]
    fit = min(fits) if fits else None
    data = {"head": outputs[0].head, "likelihood": kind, "fit": fit}
    if loss is None:
        return Finding("loss", "ok", f"{name}: {kind}, a likelihood of your own", data)
    if fit is None:
        return Finding("loss", "ok", f"{name}: {kind}, a {loss}; {_OPEN[kind]}", data)
    share = "every prediction" if fit == 1 else f"{fit:.1%} of the predictions"
    text = f"{name}: {kind}; the gradient is that of a {loss} in {share}"
    return Finding("loss", "ok" if fit >= 0.9 else "note", text, data)


def _weights(outputs: Sequence[OfOutput]) -> Iterator[Finding]:
    """What the predictions of one head weigh: of each output, where they are not alike."""
    each = [output.weights for output in outputs if output.weights is not None]
    if len(each) < len(outputs):
        text = f"{_named(outputs)}: no weights are read; a mean is assumed, in which each weighs 1 / B"
        yield Finding("loss", "note", text, {"head": outputs[0].head, "read": False})
        return
    least, most = min(w[0] for w in each), max(w[1] for w in each)
    if len(each) > 1 and _differ(least, most):
        for output in outputs:
            yield from _weights([output])
        return
    total, count = sum(w[2] for w in each), sum(output.counted or 0 for output in outputs)
    if _differ(least, most):
        text = f"predictions weigh from {least:.3g} to {most:.3g}, all of them {total:.4g}"
    elif abs(total - 1) < 1e-2:
        text = f"each prediction weighs 1 / {count}, as in a mean"
    elif abs(most - 1) < 1e-2:
        text = f"each prediction weighs 1, as in a sum, and all of them {total:.4g}"
    else:
        text = f"each prediction weighs {most:.3g}, {total:.4g} times what it would in a mean over these"
    data = {"head": outputs[0].head, "read": True, "least": least, "most": most, "sum": total}
    yield Finding("loss", "ok", f"{_named(outputs)}: {text} (read from the gradient)", data)


def _named(outputs: Sequence[OfOutput]) -> str:
    return ", ".join(output.name for output in outputs)


def _differ(least: float, most: float) -> bool:
    return most - least > 2e-3 * most


def _rows(account: Account) -> Finding:
    rows, share = account.rows, f"{account.share:.3g} of"
    share = f"{'all' if account.share == 1 else share} the predictions of a step"
    data = {**asdict(rows), "share": account.share, "micro_batches": account.micro_batches}
    if rows.number:
        text = (
            f"the {rows.what} are independent, as a run has shown: {rows.number} of them, along dimension "
            f"{rows.dim} of the outputs. A refresh runs {rows.taken}, {share}"
        )
        return Finding("rows", "ok", text, data)
    if rows.dependent:
        text = f"the {rows.what} are not independent ({rows.whole}). A refresh runs them all, {share}"
        return Finding("rows", "note", text, data)
    run = f"{account.taken} of {account.micro_batches} micro-batches"
    run = "the whole micro-batch" if account.micro_batches == 1 else run
    return Finding("rows", "ok", f"a refresh runs {run}, {share}, as {rows.whole}", data)


def _repetition(found: OfRepetition) -> Iterator[Finding]:
    data = asdict(found)
    state = f" ({found.moving} modules move state in a forward, which is put back)" if found.moving else ""
    if found.proved:
        text = "run again on the same inputs, weights and random numbers, a forward gave the same outputs"
        yield Finding("repetition", "ok", text + state, data)
    for reason in found.differences:
        yield Finding("repetition", "wrong", f"run again, a forward is another function: {reason}", data)
    if found.unproved:
        text = f"not proved that a forward, run again, is the same: {found.unproved}{state}"
        yield Finding("repetition", "note", text, data)
    if found.written:
        text = f"{found.written} parameters were written to between the forward and the step"
        yield Finding("repetition", "note", text, data)


def _scale(scale: float) -> Finding:
    data = {"gradient_scale": scale}
    if not scale:
        text = "what stands in .grad at the step is no one multiple of what the backward left there"
        return Finding("gradient", "note", text, data)
    if abs(scale - 1) < 1e-2:
        return Finding("gradient", "ok", "what stands in .grad at the step has the scale of that loss", data)
    text = (
        f"what stands in .grad at the step is {scale:.3g} times the gradient of that loss (clipped?): gamma "
        f"acts as {1 / scale:.3g} times itself"
    )
    return Finding("gradient", "note", text, data)
