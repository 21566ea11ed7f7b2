"""What an optimizer's state says about itself: shares, quantiles, and one line of advice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["advice", "curvature_quantiles", "step_shares"]

_SAMPLE = 2**18  # entries that the quantiles are taken over


def step_shares(
    groups: Iterable[tuple[Sequence[Tensor], Sequence[Tensor], float, float]],
) -> dict[str, float]:
    """Shares of the coordinates by what decided their last step, over ``(ms, hs, gamma, eps)`` of each group.

    ``unclipped``: |m| < gamma h, the curvature decided (the "win rate" of the official repository, meant to
    lie in 0.1-0.5). ``eps_limited``: gamma h <= eps, curvature had no say. ``h_zero``: h is exactly zero, no
    curvature was ever seen.
    """
    counts: list[Tensor] = []
    total = 0
    for ms, hs, gamma, eps in groups:
        for m, h in zip(ms, hs, strict=True):
            scaled = h * gamma
            counts.append(
                torch.stack([(m.abs() < scaled).sum(), (scaled <= eps).sum(), (h == 0).sum()]).cpu()
            )
            total += m.numel()
    if not total:
        return {"unclipped": 0.0, "eps_limited": 0.0, "h_zero": 1.0}
    sums = torch.stack(counts).sum(0).tolist()
    return dict(zip(("unclipped", "eps_limited", "h_zero"), (count / total for count in sums), strict=True))


def curvature_quantiles(hs: Sequence[Tensor]) -> dict[str, float]:
    """5%, 50% and 95% quantile of h over an evenly spaced sample of the coordinates."""
    total = sum(h.numel() for h in hs)
    if not total:
        return {"h_q05": 0.0, "h_q50": 0.0, "h_q95": 0.0}
    stride = max(1, total // _SAMPLE)
    sample = torch.cat([h.detach().reshape(-1)[::stride].float().cpu() for h in hs])
    values = torch.quantile(sample, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float32)).tolist()
    return dict(zip(("h_q05", "h_q50", "h_q95"), values, strict=True))


def advice(stats: Mapping[str, float]) -> str:
    """One line: what the numbers of ``stats()`` suggest to do, "" if nothing.

    The range 0.1-0.5 for the unclipped share is the official repository's rule for choosing gamma.

    >>> advice({"refreshes": 12, "skipped": 0, "unclipped": 0.72, "eps_limited": 0.0, "age": 3})
    'unclipped 0.72 > 0.5: close to a plain Newton step; lower gamma (halve it) or raise lr'
    """
    if stats["refreshes"] == 0:
        return "h was never refreshed: this is sign momentum, not Sophia"
    if stats["skipped"] > stats["refreshes"]:
        return "most Hessian passes were skipped: look for overflow (fp16?) or fully masked batches"
    if stats["eps_limited"] > 0.5:
        return (
            f"eps_limited {stats['eps_limited']:.2f} > 0.5: eps decides most steps; lower eps or raise gamma"
        )
    if stats["unclipped"] > 0.5:
        share = f"unclipped {stats['unclipped']:.2f} > 0.5"
        return f"{share}: close to a plain Newton step; lower gamma (halve it) or raise lr"
    if stats["unclipped"] < 0.1:
        share = f"unclipped {stats['unclipped']:.2f} < 0.1"
        return f"{share}: close to sign momentum; raise gamma (double it), or wait: h still grows early on"
    return ""
