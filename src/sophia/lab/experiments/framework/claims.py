"""The eight claims, where the paper makes them, and what others have found.

Numbers of the paper that are marked "as recalled" were not held to its text. Which experiments bear on a
claim is said by the experiments (``Experiment.claims``).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLAIMS", "Claim"]


@dataclass(frozen=True)
class Claim:
    """A claim, as made for Sophia."""

    number: int
    text: str
    paper: str
    """Where the paper (arXiv 2305.14342v4) says so, with which numbers, and what it does not say."""
    others: str
    """Independent evidence, for and against."""
    besides: str = ""
    """Other pages and records of this project that bear on it, as Markdown from ``docs/``."""


def _arxiv(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


def _thread(number: int) -> str:
    return f"[thread {number}](https://github.com/Liuhong99/Sophia/issues/{number})"


_WEN, _SEMENOV, _KADDOUR, _ZHAO = map(_arxiv, ("2509.02046", "2509.01440", "2307.06440", "2407.07972"))

CLAIMS: tuple[Claim, ...] = (
    Claim(
        1,
        "A light estimate of the diagonal of the Hessian serves as pre-conditioner, refreshed every few "
        "steps.",
        "Algorithms 1 to 3: Hutchinson or Gauss-Newton-Bartlett, every 10 steps, on 32 or 240 of 480 "
        "examples.",
        "No library had the Gauss-Newton-Bartlett estimator inside the optimizer; optax and Levanter ship "
        f"Hutchinson's. Two of three independent benchmarks scale the refresh wrongly ({_SEMENOV}: h 4 to "
        f"130 times too small; {_KADDOUR}: far too large for BERT), so they did not measure this "
        f"pre-conditioner. Sweeps by two of Sophia's authors ({_WEN}) find the loss flat in gamma over a "
        "factor of 8, and a floor eps of 1e-7 better than the paper's 1e-12 by 0.006 to 0.022.",
        "[Audits](audits.md) of what can be installed; `tests/curvature`.",
    ),
    Claim(
        2,
        "Clipping element by element punishes sharp dimensions more, so the loss decreases evenly in all.",
        "Introduction, section 2.1 and its figure in two dimensions. What is clipped is the pre-conditioned "
        "momentum, not the gradient.",
        f"No independent measurement was found. {_ZHAO} (150M to 1.2B parameters): apart from the last layer "
        "and the normalisations, sign momentum does as well as Adam and Sophia.",
    ),
    Claim(
        3,
        "Little overhead in time and memory.",
        "Hessian passes are 6% of the compute, less than 5% of the time; two states a parameter, as AdamW. "
        "So not less than Adam's, as some summaries have it: other second-order methods are what it beats.",
        f"A user of the official code saw the throughput fall by 13% at 1B parameters and by 22% at 280M on "
        f"A100s ({_thread(27)}); {_KADDOUR} charges 12% a step.",
        "[Peak memory and the time of the step alone](../results/benchmarks).",
    ),
    Claim(
        4,
        "One changed line in a PyTorch script.",
        "The paper says that it is easy to use with PyTorch. The official code asks for more: logits, a "
        "second backward pass and a batch size in tokens, all in the training script.",
        "Most public ports leave the estimator, or the count of predictions in it, to the user's script; the "
        "commonest results are h that is never refreshed and counts that are wrong by a factor.",
        "[How the drop-in works](drop-in.md): loops, autocast, compilation, frameworks; several processes in "
        "[distributed](distributed.md).",
    ),
    Claim(
        5,
        "Stable where AdamW and Lion need the attention scores divided by the layer's number.",
        "Section on stability: at 355M parameters AdamW and Lion take at most half the learning rate without "
        "that trick, and their gradients are clipped in more than 10% of the steps; Sophia-H was run without "
        "it.",
        "The official training scripts, and Levanter's, switch the trick on in their Sophia runs. "
        f"{_WEN}: Sophia needed a warm-up of 4,000 steps where AdamW took 1,000 to 2,000, and diverged with "
        f"1,000 or fewer in five of six settings. {_SEMENOV} sees it destabilise in long runs, with the "
        "refresh wrongly scaled.",
    ),
    Claim(
        6,
        "Twice as fast as Adam from 125M to 770M parameters in steps, compute and time, at half the cost.",
        "Figures 1 and 4: the same loss in half the steps, each with its own schedule. The halved bill in "
        "dollars is the press's, not the paper's.",
        f"Another user with one script and a sweep for both ({_thread(31)}): AdamW 2.869, Sophia-G 2.876 at "
        f"125M (the authors: 2.927 and 2.894); AdamW at 200K steps 2.863, Sophia at 100K 2.897 "
        f"({_thread(46)}): no factor of two. Both tuned at 130M to 520M ({_WEN}): Sophia -0.005 to +0.015 "
        f"from AdamW, a tie. Ties also in {_ZHAO} and {_arxiv('2507.08472')}; in {_KADDOUR} the gain is "
        "gone at equal time. No source was found in which a Sophia clearly beats a tuned AdamW.",
        "[Six contenders](six-contenders.md) at 1.1M parameters.",
    ),
    Claim(
        7,
        "A run time that does not depend on the condition number.",
        'Theorem 4.3, "in a much simplified setting": full Hessian, convex, no noise, no momentum. Nothing '
        "is claimed for the diagonal, stochastic method that is used.",
        "Reviewers of the paper noted that the theorem is about (almost) another algorithm, under a strong "
        "assumption. No independent measurement was found.",
    ),
    Claim(
        8,
        "People with few resources can study pre-training.",
        "The mission's claim, not the paper's: the first version reports 6,000 hours of A100 and 10,000 of "
        "A5000.",
        f"What holds for small models need not hold for large ones: in {_WEN} the speed-up of the best "
        "methods falls from 1.4 at 0.1B parameters to 1.1 at 1.2B.",
        "[Six contenders](six-contenders.md) and [the quick comparison](../results/comparisons/quick) were "
        "run on two cores.",
    ),
)
