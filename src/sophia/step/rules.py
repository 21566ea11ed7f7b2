"""The table of step rules: what each needs, its defaults, and its direction. A new rule is a row here.

A rule has a ``direction`` from momentum and curvature, or ``statistics`` of the gradients alone.

The equations are in ``update_rule.py``. A kernel names the rules that it knows (``RULES`` in its module); any
rule at all runs in ``kernels/single_tensor.py``, by its ``direction``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sophia.step.second_moments import Equilibrated, Factored, SecondMoments, Whitened
from sophia.update_rule import clipped_direction, damped_direction

__all__ = ["DAMPED", "FACTORED", "PAPER", "RULES", "SPECTRAL", "WHITENED", "Rule", "StepSettings"]


class StepSettings(NamedTuple):
    """The numbers of one step of one group, as the kernels take them."""

    rule: Rule
    """The rule of all tensors of the call."""
    lr: float | Tensor
    """The largest move of a coordinate, decay and ``scale`` aside."""
    beta1: float
    """Decay of m."""
    gamma: float
    """Scale of h, corrected for the start at zero where the rule asks for it."""
    eps: float
    """Floor of the denominator."""
    weight_decay: float
    """Decoupled, times lr."""
    maximize: bool = False
    """Go up."""
    damping: float = 0.0
    """Floor of gamma h in units of the rms of u."""
    scale: float = 1.0
    """Of the step, for the kind of tensor; decay is without it."""
    started: float = 1.0
    """The part that u has of its steady size, ``update_rule.started``."""
    stochastic: bool = False
    """Round parameters in bfloat16 stochastically as well as state; needs keys."""
    beta2: float = 0.0
    """Decay of second moments, a step."""
    every: int = 1
    """Steps between two decompositions of second moments."""


@dataclass(frozen=True, eq=False)  # one object a rule: compared by identity, at every step
class Rule:
    """A step rule: theta <- theta (1 - lr wd) - lr scale direction."""

    name: str
    """As it stands in ``rule=``, in groups and in checkpoints."""
    direction: Callable[[Tensor, Tensor, Tensor | None, StepSettings], Tensor] | None
    """``direction(u, h, size, settings)``, of the shape of u, in its dtype, without side effects. u is m, or
    looks ahead of it; ``size`` is a scalar where ``keeps_rms``, else None. None: the rule has ``statistics``.
    """
    betas: tuple[float, float]
    """Default decays of m (a step) and of h (a refresh) or of second moments (a step)."""
    gamma: float = 0.05
    """Default scale of h."""
    statistics: SecondMoments | None = None
    """What stands for h where a rule has no curvature: then nothing is refreshed."""
    damping: float = 0.5
    """Default floor: of gamma h, in units of the rms of u; of eigenvalues, in units of their mean."""
    eps: float = 1e-12
    """Default floor of gamma h; without curvature what is added to the root of second moments."""
    update_every: int = 10
    """Default steps between two refreshes, or two decompositions."""
    lr_over_adamw: float = 1.0
    """The lr to begin with where AdamW's is known, over AdamW's."""
    looks_ahead: bool = False
    """Whether u is Nesterov's look-ahead in place of m."""
    starts_corrected: bool = False
    """Whether m and h are corrected for their start at zero. The correction changes at every step, so such a
    rule stays out of compiled graphs.
    """
    keeps_rms: bool = False
    """Whether a tensor keeps one number more, the rms of its u: ``state[p]["momentum_rms"]``."""
    needs_whole: bool = False
    """Whether it needs all of a tensor at once, so that shards are refused."""
    kind_scales: tuple[float, float] | None = None
    """Steps in units of lr, of hidden tensors and of the rest; None where all kinds move alike. With scales
    the model must be known: it tells the kinds apart.
    """
    otherwise: Rule | None = None
    """The rule of tensors that are no matrices, where this one is for matrices alone."""

    @property
    def has_curvature(self) -> bool:
        """Whether it divides by h, which is refreshed."""
        return self.statistics is None

    @property
    def needs_model(self) -> bool:
        """Whether kinds of tensors are told apart."""
        return self.kind_scales is not None

    def moving(self, tensor: Tensor) -> Rule:
        """The rule that moves this tensor: this one, or what stands in for it."""
        return self if self.otherwise is None or tensor.ndim == 2 else self.otherwise


def _clipped(u: Tensor, h: Tensor, size: Tensor | None, s: StepSettings) -> Tensor:
    return clipped_direction(u, h, gamma=s.gamma, eps=s.eps)


def _damped(u: Tensor, h: Tensor, size: Tensor | None, s: StepSettings) -> Tensor:
    assert size is not None
    return damped_direction(u, h, size=size, gamma=s.gamma, eps=s.eps, damping=s.damping)


PAPER = Rule("paper", _clipped, betas=(0.96, 0.99), gamma=0.05, lr_over_adamw=0.5)
"""Algorithm 3 of arXiv 2305.14342v4, with the paper's values."""

# Values of our own rules and their scales: docs/research.md. AdamW, tuned with a rate for each kind, chose 1
# to 35, and its best single rate lies between the two; the damped rule chose 1 to 40 at widths 96 to 384. Its
# lr is of the size of AdamW's, that of the rules without curvature some four times as large.
DAMPED = Rule(
    "damped",
    _damped,
    betas=(0.9, 0.9),
    gamma=0.2,
    looks_ahead=True,
    starts_corrected=True,
    keeps_rms=True,
    kind_scales=(0.1, 4.0),
)
"""Clipped element by element above a floor of the tensor's own momentum."""

FACTORED = Rule(
    "factored",
    None,
    betas=(0.8, 0.95),
    statistics=Factored(power=1 / 2),
    damping=1e-6,
    eps=1e-8,
    update_every=5,
    lr_over_adamw=4.0,
    starts_corrected=True,
    needs_whole=True,
    kind_scales=(0.05, 1.0),
)
"""Adam with a factored second moment, whole on the short side of a matrix."""

SPECTRAL = Rule(
    "spectral",
    None,
    betas=(0.9, 0.9),
    statistics=Equilibrated(power=1 / 4),
    damping=0.0,
    eps=1e-8,
    update_every=5,
    lr_over_adamw=4.0,
    starts_corrected=True,
    needs_whole=True,
    kind_scales=(0.2, 1.0),
    otherwise=FACTORED,
)
"""Singular values of hidden matrices bounded, whitened by the squares of their momentum."""

WHITENED = Rule(
    "whitened",
    None,
    betas=(0.9, 0.9),
    statistics=Whitened(power=1 / 8),
    damping=1e-4,
    eps=1e-8,
    update_every=5,
    lr_over_adamw=4.0,
    starts_corrected=True,
    needs_whole=True,
    kind_scales=(0.3, 1.0),
    otherwise=FACTORED,
)
"""Singular values of hidden matrices bounded, whitened by second moments of their gradients."""

RULES: dict[str, Rule] = {rule.name: rule for rule in (PAPER, DAMPED, SPECTRAL, WHITENED, FACTORED)}
"""By the name that a group holds: any format of checkpoints carries a string."""
