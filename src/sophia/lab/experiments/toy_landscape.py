"""The paper's picture of two dimensions, one sharp and one flat; with many starts and all step sizes.

    L(a, b) = L1(a) + L2(b),   L1 = 8 (a - 1)^2 (1.3 a^2 + 2 a + 1),   L2 = (b - 4)^2 / 2      (section 2.1)

L1 has its minimum at a = 1 (curvature 68.8), a maximum at a = 0 and a second, worse minimum at a = -0.654;
between -0.366 and 0.596 it is concave. Newton's method goes to the nearest point without a slope whatever its
kind: from the concave part that is the saddle (0, 4).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sophia.lab.experiments.framework.definition import Experiment, Verdict
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records, Row
from sophia.update_rule import sophia_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "curvature", "gradient", "loss", "parts", "settled", "starts", "trajectory"]

TARGET = 1e-2
START = (0.2, 0.0)
"""The start that is drawn; the paper's is not known."""
STARTS = 200
"""Starts drawn at random where L1 is concave, right of its maximum: 0 < a < 0.596, 0 < b < 3."""
BAD_STARTS = 50
"""And left of it, -1 < a < 0: everything that goes down goes to the worse minimum there."""
STEPS = 300
METHODS: dict[str, str] = {
    "gradient descent": "#6b6b6b",
    "SignGD": "#009e73",
    "Adam": "#2b2b2b",
    "Newton": "#0072b2",
    "Sophia": "#d55e00",
}
"""With their colours."""


def parts(theta: Tensor) -> Tensor:
    """L1 and L2 at points (n, 2): (n, 2)."""
    a, b = theta.unbind(-1)
    return torch.stack([8 * (a - 1) ** 2 * (1.3 * a**2 + 2 * a + 1), 0.5 * (b - 4) ** 2], -1)


def loss(theta: Tensor) -> Tensor:
    """L of points (n, 2): (n,)."""
    return parts(theta).sum(-1)


def gradient(theta: Tensor) -> Tensor:
    """Its gradient, (n, 2)."""
    a, b = theta.unbind(-1)
    first = 16 * (a - 1) * (1.3 * a**2 + 2 * a + 1) + 8 * (a - 1) ** 2 * (2.6 * a + 2)
    return torch.stack([first, b - 4], -1)


def curvature(theta: Tensor) -> Tensor:
    """The diagonal of its Hessian, (n, 2); there is nothing off the diagonal."""
    a, _ = theta.unbind(-1)
    first = 16 * (1.3 * a**2 + 2 * a + 1) + 32 * (a - 1) * (2.6 * a + 2) + 20.8 * (a - 1) ** 2
    return torch.stack([first, torch.ones_like(a)], -1)


def trajectory(method: str, lr: float, start: Tensor, steps: int) -> Tensor:
    """Points (steps + 1, n, 2) from starts (n, 2): all methods work on each coordinate alone."""
    theta = start.clone().requires_grad_()
    update = _update(method, lr, theta)
    path = [start]
    for _ in range(steps):
        theta.grad = gradient(theta.detach())
        with torch.no_grad():
            update()
        path.append(theta.detach().clone())
    return torch.stack(path)


def _update(method: str, lr: float, theta: Tensor) -> Callable[[], Any]:
    """Moves theta, whose ``.grad`` is there, by one step."""
    if method == "gradient descent":
        return torch.optim.SGD([theta], lr=lr).step
    if method == "Adam":
        return torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.95)).step

    def update() -> None:
        g, h = theta.grad, curvature(theta)
        assert g is not None
        if method == "SignGD":
            theta.sub_(lr * g.sign())
        elif method == "Newton":
            theta.sub_(lr * g / h)
        else:  # the paper's rule with the exact curvature, as its figure has it: no momentum, no average
            moved, _ = sophia_step(
                theta, g, torch.zeros_like(g), h, lr=lr, beta1=0.0, gamma=lr, eps=1e-12, weight_decay=0.0
            )
            theta.copy_(moved)

    return update


def starts(number: int, low: float, high: float, seed: int) -> Tensor:
    """Random starts (number, 2) with ``low < a < high`` and 0 < b < 3."""
    draw = torch.rand(number, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw * torch.tensor([high - low, 3.0]) + torch.tensor([low, 0.0])


def run(quick: bool, records: Records, progress: Progress) -> None:
    """A grid of step sizes for each method from all starts, then the path of the best from the stated one."""
    count, bad, steps, per_decade = (4, 3, 40, 2) if quick else (STARTS, BAD_STARTS, STEPS, 12)
    # No power of ten times a simple fraction: SignGD from a start on its grid would hit the minimum by luck.
    exponents = range(round(-2.5 * per_decade), round(0.25 * per_decade) + 1)
    rates = [float(f"{1.03 * 10 ** (e / per_decade):.4g}") for e in exponents]
    good, left = starts(count, 0.0, 0.596, seed=1), starts(bad, -1.0, 0.0, seed=2)
    everywhere = torch.cat([torch.tensor([START], dtype=torch.float64), good, left])
    grid = [{"method": m, "lr": lr} for m in METHODS for lr in ([1.0, *rates] if m == "Newton" else rates)]
    for case in records.left(grid, progress):
        path = trajectory(case["method"], case["lr"], everywhere, steps)
        first = settled(TARGET, loss(path))
        saddle = (path[-1] - torch.tensor([0.0, 4.0])).norm(dim=-1) < 0.05
        worse = (path[-1] - torch.tensor([-0.6541, 4.0])).norm(dim=-1) < 0.2
        inside = slice(1, 1 + count)
        records.add(
            case,
            limit=steps,
            from_stated_start=first[0],
            steps=first[inside],
            at_saddle=int(saddle[inside].sum()),
            reached_from_left=sum(s is not None for s in first[1 + count :]),
            left_in_worse_minimum=int(worse[1 + count :].sum()),
            starts_left=bad,
        )
    paths = [{"path": True, "method": m, "lr": best(records, m).case["lr"]} for m in METHODS]
    for case in records.left(paths, progress):
        path = trajectory(case["method"], case["lr"], torch.tensor([START], dtype=torch.float64), 60)[:, 0]
        records.add(case, points=[[round(float(x), 5) for x in p] for p in path], loss=loss(path).tolist())


def settled(target: float, losses: Tensor) -> list[int | None]:
    """From which step on each column of losses (steps + 1, n) stays below the target: passing by is not
    enough.
    """
    found: list[int | None] = []
    for column in losses.T:
        above = (~(column < target)).nonzero()  # not >=: NaN is above
        first = int(above[-1]) + 1 if len(above) else 0
        found.append(first if first < len(column) else None)
    return found


def best(records: Records, method: str) -> Row:
    """The step size with the fewest steps in the median over the starts; the full step for Newton.

    A start from which the target is not reached counts as the limit, twice.
    """
    rows = [row for row in records.where(method=method) if "path" not in row.case]
    if method == "Newton":
        return next(row for row in rows if row.case["lr"] == 1.0)
    return min(rows, key=lambda row: (_median(row), _mean(row)))


def _counted(row: Row) -> list[int]:
    return [2 * row.result["limit"] if s is None else s for s in row.result["steps"]]


def _median(row: Row) -> float:
    return median(_counted(row))


def _mean(row: Row) -> float:
    return sum(_counted(row)) / len(_counted(row))


def verdict(records: Records) -> Verdict:
    """Sophia needs the fewest steps, and Newton alone ends at the saddle."""
    chosen = {method: best(records, method) for method in METHODS}
    medians = {method: _median(row) for method, row in chosen.items()}
    number = len(chosen["Sophia"].result["steps"])
    reached = {m: sum(s is not None for s in row.result["steps"]) for m, row in chosen.items()}
    rivals = [m for m in METHODS if m != "Sophia"]
    fewest = all(medians["Sophia"] < medians[m] for m in rivals)
    stuck, never = chosen["Newton"].result["at_saddle"], chosen["Sophia"].result["at_saddle"] == 0
    left, of = chosen["Sophia"].result["reached_from_left"], chosen["Sophia"].result["starts_left"]
    best_damped = min((row for row in records.where(method="Newton") if "path" not in row.case), key=_median)
    words = "; ".join(
        f"{m} {medians[m]:g}" if medians[m] <= chosen[m].result["limit"] else f"{m} not in the median"
        for m in sorted(METHODS, key=lambda m: medians[m])
    )
    sentence = (
        f"Steps to a loss that stays under {TARGET:g}, median over {number} starts where L1 is concave, "
        f"each method with its best constant step size: {words}. Newton ends at the saddle from {stuck} of "
        f"{number} starts ({best_damped.result['at_saddle']} with its best damped step), Sophia from "
        f"{chosen['Sophia'].result['at_saddle']} and reaches the target from {reached['Sophia']}. "
        f"Left of the maximum of L1 Sophia reaches it from {left} of {of} starts only: like everything that "
        "goes downhill it ends in the worse minimum there."
    )
    holds = fewest and stuck > number / 2 and never
    return Verdict("holds" if holds else "holds in part" if fewest or never else "contradicted", sentence)


def draw(records: Records) -> Figure:
    """Paths over the landscape, and the loss along them; then all starts and all step sizes."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    plane, curve, rates = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    a, b = np.meshgrid(np.linspace(-1.0, 1.6, 200), np.linspace(-0.5, 5.0, 200))
    height = loss(torch.from_numpy(np.stack([a, b], -1))).numpy()
    plane.contourf(a, b, np.log10(height + 1e-3), levels=20, cmap="Greys", alpha=0.35)
    for method, colour in METHODS.items():
        for row in records.where(method=method, path=True):
            points = np.array(row.result["points"])
            plane.plot(points[:, 0], points[:, 1], ".-", ms=4, lw=1, color=colour)
            curve.plot(np.maximum(row.result["loss"], 1e-9), color=colour, lw=1.6)
            label = f"{method} {row.case['lr']:.2g}"
            curve.plot([], [], color=colour, label=label)
        grid = sorted(
            (row for row in records.where(method=method) if "path" not in row.case),
            key=lambda row: row.case["lr"],
        )
        reached = [(r.case["lr"], _median(r)) for r in grid if _median(r) <= r.result["limit"]]
        if reached:
            rates.plot(*zip(*reached, strict=True), ".-", ms=4, lw=1, color=colour)
    plane.plot(*START, "o", mfc="white", mec="black", zorder=5)
    plane.plot(1, 4, "*", ms=11, color="black", zorder=5)
    plane.plot(0, 4, "x", ms=8, mew=2, color="black", zorder=5)
    plane.set(xlim=(-1.0, 1.6), ylim=(-0.5, 5), xlabel="sharp dimension", ylabel="flat dimension")
    plane.set_title(f"From {START} (o); saddle x, minimum *", loc="left", fontsize=10)
    plane.grid(False)
    curve.axhline(TARGET, color="#999999", lw=0.8, ls=":")
    curve.set(yscale="log", xlim=(0, 60), ylim=(1e-7, 30), xlabel="steps")
    curve.set_title("Loss on these paths (best step size)", loc="left", fontsize=10)
    curve.legend(frameon=False, fontsize=8)
    rates.set(xscale="log", yscale="log", xlabel="step size")
    rates.set_title(f"Steps to {TARGET:g}, median over the starts", loc="left", fontsize=10)
    return figure


EXPERIMENT = Experiment(
    name="toy-landscape",
    title="one sharp and one flat dimension: paths and steps of five methods",
    claims=(2,),
    claim=(
        "In a landscape with a sharp and a flat dimension gradient descent, SignGD and Adam are slow in "
        "the flat one or bounce in the sharp one, Newton's method goes to a saddle, and Sophia converges "
        "in a few steps (section 2.1 and its figure)."
    ),
    scale=(
        "The paper's own function of two variables; exact gradients and curvature, no momentum in Sophia, "
        "lr = gamma (a full Newton step, clipped at lr). The paper's start and step sizes are not known: "
        f"{STARTS} random starts in the concave part and "
        f"{BAD_STARTS} left of the maximum, and for every method the best of 34 constant step sizes."
    ),
    expected=(
        "Sophia first, SignGD and Adam about four times slower, gradient descent slowest, Newton at the "
        "saddle from the concave part; left of the maximum of L1 nobody reaches the better minimum."
    ),
    runtime="20 s on one core; quick 1 s",
    figure=(
        "Left: paths from the stated start. Middle: the loss along them. Right: the median number of steps "
        "against the step size, only where at least half of the starts reach the target."
    ),
    record=(
        "A method and a step size: steps after which the loss from each start stays below the target (null: "
        "never), how many end at the saddle; and five rows with a path."
    ),
    run=run,
    draw=draw,
    verdict=verdict,
    parts=("paper",),
)
