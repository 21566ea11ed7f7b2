"""Statistics of an optimizer's state (shares, quantiles), and one line of advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["advice", "describe"]

_SAMPLE = 2**18  # entries that the quantiles are taken over
_FAR = 30.0  # times larger or smaller, for a gradient that was clipped
_PART = 2**13  # the same for each rank, where the ranks put theirs together


Groups = Sequence[tuple[Sequence[Tensor], Sequence[Tensor], float, float]]


def describe(groups: Groups, *, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """Shares and quantiles over ``(ms, hs, gamma, eps)`` of each group, plain tensors.

    ``unclipped``: |m| < gamma h, the curvature decided (the "win rate" of the official repository, meant to
    lie in 0.1-0.5). ``eps_limited``: gamma h <= eps, curvature had no say. ``h_zero``: h is exactly zero, no
    curvature was ever seen. ``h_q05``, ``h_q50``, ``h_q95``: quantiles of h over an evenly spaced sample.

    Args:
        groups: what this process holds.
        gather: stacks the vectors of all ranks, where the others hold other parts.
    """
    counts = _counts(groups)
    sample = _evenly_spaced([h for _, hs, _, _ in groups for h in hs], _SAMPLE if gather is None else _PART)
    if gather is not None:
        counts = gather(counts).sum(0)
        sample = gather(
            torch.nn.functional.pad(sample, (0, 2 * _PART - len(sample)), value=math.nan)
        ).flatten()
        sample = sample[~sample.isnan()]
    *shares, total = counts.tolist()
    if not total:
        return {"unclipped": 0.0, "eps_limited": 0.0, "h_zero": 1.0, "h_q05": 0.0, "h_q50": 0.0, "h_q95": 0.0}
    at = torch.tensor([0.05, 0.5, 0.95], dtype=sample.dtype)
    return {
        **dict(zip(("unclipped", "eps_limited", "h_zero"), (share / total for share in shares), strict=True)),
        **dict(zip(("h_q05", "h_q50", "h_q95"), torch.quantile(sample, at).tolist(), strict=True)),
    }


def _counts(groups: Groups) -> Tensor:
    """How many coordinates: unclipped, limited by eps, with h = 0, at all."""
    counts = torch.zeros(4, dtype=torch.float64)
    pieces: list[Tensor] = []
    for ms, hs, gamma, eps in groups:
        for m, h in zip(ms, hs, strict=True):
            scaled = h.to(torch.promote_types(h.dtype, torch.float32)) * gamma
            pieces.append(
                torch.stack([(m.abs() < scaled).sum(), (scaled <= eps).sum(), (h == 0).sum()]).cpu()
            )
            counts[3] += m.numel()
    if pieces:
        counts[:3] = torch.stack(pieces).sum(0)
    return counts


def _evenly_spaced(hs: Sequence[Tensor], size: int) -> Tensor:
    """About ``size`` entries, fewer than twice as many, of all tensors together."""
    total = sum(h.numel() for h in hs)
    stride = max(1, total // size)
    return torch.cat(
        [torch.zeros(0, dtype=torch.float32), *(h.detach().reshape(-1)[::stride].float().cpu() for h in hs)]
    )[: 2 * size]


def advice(stats: Mapping[str, float]) -> str:
    """One line: what the numbers of ``stats()`` suggest to do, "" if nothing.

    The range 0.1-0.5 for the unclipped share is the official repository's rule for choosing gamma; for rules
    of our own no share is too large or too small.

    >>> advice({"refreshes": 12, "skipped": 0, "unclipped": 0.72, "eps_limited": 0.0, "age": 3})
    'unclipped 0.72 > 0.5: close to a plain Newton step; lower gamma (halve it) or raise lr'
    >>> advice({"refreshes": 1, "skipped": 0, "unclipped": 0.04, "eps_limited": 0.92, "h_zero": 0.92})
    'h_zero 0.92: h is exactly 0 in 92% of the coordinates, where no refresh has seen anything yet ...'
    """
    if stats.get("has_curvature", 1.0) == 0:
        return ""  # nothing to refresh
    if stats["refreshes"] == 0:
        return "h was never refreshed: this is sign momentum, not Sophia"
    if stats["skipped"] > stats["refreshes"]:
        return "most Hessian passes were skipped: look for overflow (fp16?) or fully masked batches"
    scale = stats.get("gradient_scale", 1.0) or 1.0
    if not 1 / _FAR < scale < _FAR:
        return (
            f"gradient_scale {scale:.2g}: the gradients in .grad are {scale:.2g} times those of the loss, so "
            f"gamma acts as {1 / scale:.2g} times itself. Look at what clips or scales them before you touch "
            "gamma"
        )
    if stats.get("own_rule", 0.0) > 0.5:
        return ""  # the floor of the damped rule and the polar factor decide most steps there, by design
    zero = stats.get("h_zero", 0.0)
    # Neither eps nor gamma moves a denominator whose h is zero: these steps are of size lr whatever they are.
    if zero > 0.5 and stats["eps_limited"] > 0.5:
        return (
            f"h_zero {zero:.2f}: h is exactly 0 in {zero:.0%} of the coordinates, where no refresh has seen "
            "anything yet (rows of rare tokens, as a rule), and they move by sign momentum. It fills over "
            f"the refreshes ({stats['refreshes']:.0f} so far); a larger fraction or a smaller update_every "
            "fills it faster. gamma and eps cannot: set them by the rest"
        )
    if stats["eps_limited"] > 0.5:
        return (
            f"eps_limited {stats['eps_limited']:.2f} > 0.5: eps decides most steps; lower eps or raise gamma"
        )
    if stats["unclipped"] > 0.5:
        share = f"unclipped {stats['unclipped']:.2f} > 0.5"
        return f"{share}: close to a plain Newton step; lower gamma (halve it) or raise lr"
    if stats["unclipped"] < 0.1:
        share = f"unclipped {stats['unclipped']:.2f} < 0.1"
        return (
            f"{share}: close to sign momentum; raise gamma (double it), or wait: h still grows early on. At "
            "a few thousand tokens a step m is mostly noise, which rule='damped' and 'spectral' mind less"
        )
    return ""
