"""What the model's outputs mean: the distribution p(y | outputs) from which a Gauss-Newton pass samples
labels.

A likelihood answers three questions: how many predictions are in an output tensor, what is the gradient of
the negative log-likelihood for labels *sampled from the model*, and (for tests and tiny models) what is the
exact curvature of the negative log-likelihood in the outputs. Its loss is the one the user trains with, up to
the labels: cross-entropy for ``Categorical``, ``BCEWithLogitsLoss`` for ``Bernoulli``, ``MSELoss`` for
``Gaussian``, ``PoissonNLLLoss`` for ``Poisson``. ``Heads`` is for models with several outputs.

likelihood    what one is, to derive your own from
categorical   classes
distillation  classes, and a teacher's softmax at a temperature
alignments    label sequences without their place in time (CTC)
aligned       signs of those in a gradient
comparisons   signs of differences of scores, and of losses of straight pieces
sampling      drawing them, and a gradient told by its few entries
elementwise   yes or no, real numbers, counts
heads         several outputs, each with its likelihood and weight
weights       of each prediction of classes, read from the gradient of the user's loss
lines         the fits behind that
soft_targets  the same where a teacher gives every class a part
elements      the same for one number a prediction
evidence      what is known of gradients that do not fit
misfit        what a loss seems to be that is not the likelihood's
problems      what a loss seems to be that is not the likelihood's: a table of causes
"""

from __future__ import annotations

from sophia.likelihoods.alignments import CTC
from sophia.likelihoods.categorical import Categorical
from sophia.likelihoods.distillation import Distillation
from sophia.likelihoods.elementwise import Bernoulli, Gaussian, Poisson
from sophia.likelihoods.heads import Head, Heads, heads_of
from sophia.likelihoods.likelihood import Likelihood
from sophia.likelihoods.misfit import Problem
from sophia.likelihoods.sampling import inverse_cdf
from sophia.likelihoods.weights import Reading

__all__ = [
    "CTC",
    "Bernoulli",
    "Categorical",
    "Distillation",
    "Gaussian",
    "Head",
    "Heads",
    "Likelihood",
    "Poisson",
    "Problem",
    "Reading",
    "heads_of",
    "inverse_cdf",
    "likelihood_named",
]


def likelihood_named(name: str | Likelihood | Heads) -> Likelihood | Heads:
    """Turn a name or an object into a likelihood."""
    if isinstance(name, (Likelihood, Heads)):
        return name
    table: dict[str, type[Likelihood]] = {
        "categorical": Categorical,
        "bernoulli": Bernoulli,
        "gaussian": Gaussian,
        "poisson": Poisson,
    }
    if name not in table:
        raise ValueError(
            f"likelihood={name!r} is unknown: give one of {', '.join(map(repr, table))} or an object "
            "derived from sophia.likelihoods.Likelihood, or sophia.likelihoods.Heads for several outputs"
        )
    return table[name]()
