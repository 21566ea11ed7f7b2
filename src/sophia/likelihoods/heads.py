"""Models with several outputs, each with a loss of its own: a likelihood and a weight for each head.

The loss is ``sum_i w_i (1/B_i) sum_b -log p_i(y_b | z_b)``: a mean over the head's own counted predictions,
times its weight. Its Gauss-Newton matrix is ``sum_i w_i G_i``, and

    h_hat = ( grad of sum_i sqrt(w_i / B_i) sum_b -log p_i(y_b | z_b) )^2 ,   y_b drawn from p_i(. | z_b),

is unbiased for its diagonal, in one backward: labels of different heads are drawn independently, so the cross
terms between heads vanish like those between predictions (``sophia.curvature.gauss_newton_bartlett``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sophia.likelihoods.likelihood import Likelihood

__all__ = ["Head", "Heads", "heads_of"]


@dataclass(frozen=True)
class Head:
    """One output of a model."""

    name: str
    likelihood: Likelihood
    weight: float = 1.0
    purpose: str = "labels"
    """What its noise is drawn for: another stream for each head."""


class Heads:
    """Several outputs of one model; give it as ``likelihood=``.

    The outputs are looked for by name in what the model returns (``output.value`` or ``output["value"]``), or
    in the mapping that ``logits_fn`` makes of it. Which predictions count is read for each head from the
    gradient of its loss; a head that the loss of a step leaves out counts none. ``stats()["B"]`` is the sum
    over the heads.

    Args:
        parts: by name of the output, its likelihood.
        weights: by name, the factor of its mean loss in the whole loss; 1 where none is given.

    >>> from sophia.likelihoods import Categorical, Gaussian
    >>> Heads({"logits": Categorical(), "value": Gaussian()}, weights={"value": 0.5})
    Heads(logits=Categorical x 1, value=Gaussian x 0.5)
    """

    def __init__(
        self, parts: Mapping[str, Likelihood], *, weights: Mapping[str, float] | None = None
    ) -> None:
        weights = {} if weights is None else weights
        unknown = sorted(set(weights) - set(parts))
        if not parts or unknown:
            raise ValueError(
                f"Heads got weights for {unknown}, but its outputs are {list(parts)}: give each output a "
                "likelihood, and weights to outputs that have one"
            )
        for name, part in parts.items():
            if not isinstance(part, Likelihood):
                raise ValueError(
                    f"the likelihood of {name!r} is {part!r}: give an object, for instance "
                    "sophia.likelihoods.Categorical()"
                )
            weight = weights.get(name, 1.0)
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {name!r} is {weight!r}: expected a finite number above 0")
        self.heads = tuple(
            Head(name, part, float(weights.get(name, 1.0)), f"labels of {name}")
            for name, part in parts.items()
        )

    def __repr__(self) -> str:
        parts = (f"{h.name}={type(h.likelihood).__name__} x {h.weight:g}" for h in self.heads)
        return f"Heads({', '.join(parts)})"


def heads_of(likelihood: Likelihood | Heads) -> tuple[Head, ...]:
    """The heads; a plain likelihood is one, called "logits"."""
    return likelihood.heads if isinstance(likelihood, Heads) else (Head("logits", likelihood),)
