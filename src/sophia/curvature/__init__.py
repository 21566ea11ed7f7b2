"""Estimators of the diagonal of the curvature, and the exact diagonal for tiny models.

gauss_newton_bartlett   Algorithm 2 of the paper, the default
hutchinson              Algorithm 1
empirical_fisher        the training labels in place of sampled ones; biased, for ablations
exact                   torch.func oracles for models of a few hundred parameters
"""

from sophia.curvature.empirical_fisher import EmpiricalFisher
from sophia.curvature.estimate import Estimate, Estimator, MicroBatch, PassContext
from sophia.curvature.gauss_newton_bartlett import GaussNewtonBartlett
from sophia.curvature.hutchinson import Hutchinson
from sophia.likelihoods import Heads, Likelihood, likelihood_named

__all__ = [
    "EmpiricalFisher",
    "Estimate",
    "Estimator",
    "GaussNewtonBartlett",
    "Hutchinson",
    "MicroBatch",
    "PassContext",
    "agreed_likelihood",
    "estimator_named",
]


def estimator_named(name: str | Estimator, likelihood: str | Likelihood | Heads) -> Estimator:
    """Turn a name or an object into an estimator; ``likelihood`` is what Gauss-Newton-Bartlett samples
    from.
    """
    if isinstance(name, Estimator):
        return name
    if name == "gnb":
        return GaussNewtonBartlett(likelihood_named(likelihood))
    table: dict[str, type[Estimator]] = {"hutchinson": Hutchinson, "empirical_fisher": EmpiricalFisher}
    if name not in table:
        raise ValueError(
            f"estimator={name!r} is unknown: give 'gnb', 'hutchinson', 'empirical_fisher' or an object "
            "derived from "
            "sophia.curvature.Estimator"
        )
    likelihood_named(likelihood)  # a misspelt one is an error even where it has no effect
    return table[name]()


def agreed_likelihood(
    of_estimator: Likelihood | Heads, of_optimizer: Likelihood | Heads, given: object
) -> Likelihood | Heads:
    """The one likelihood of an estimator that has its own and of the optimizer around it.

    The optimizer reads from it what counts, and the estimator samples from it: two would be a wrong count.

    Args:
        of_estimator: what it samples from.
        of_optimizer: the object made of ``given``.
        given: ``likelihood=`` as the user wrote it; the default gives way.

    Raises:
        ValueError: they are not of one kind.
    """
    if given != "categorical" and type(of_estimator) is not type(of_optimizer):
        raise ValueError(
            f"the estimator samples from {type(of_estimator).__name__}, but likelihood={given!r}: what "
            "counts and what is sampled must be the same. Give one of them, for instance "
            "estimator=GaussNewtonBartlett(Bernoulli())"
        )
    return of_estimator
