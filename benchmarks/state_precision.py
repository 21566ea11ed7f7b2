"""What an average of curvature becomes when it is kept in 16 or 8 bits, beside the same in float64.

    python benchmarks/state_precision.py

16384 coordinates whose true curvature is lognormal (standard deviation 1.15 of the logarithm), 600 estimates
of each, h_hat = h u^2 with u normal: what Gauss-Newton-Bartlett draws. Printed is the ratio of the average to
float64's: median and quartiles over the coordinates. The 8-bit rows need torchao, whose blockwise state with
an unsigned map they use; without it they are left out.
"""

import torch

from sophia.step.kernels.average_curvature import average
from sophia.step.rounding import key_of_parameter

try:
    from torchao.optim.subclass_8bit import OptimState8bit
except ImportError:
    OptimState8bit = None

COORDINATES, STEPS = 256 * 64, 600


def main() -> None:
    """Simulate and print."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.exp(torch.randn(COORDINATES, generator=generator) * 1.15)
    for beta in (0.99, 0.96):
        exact = torch.zeros(COORDINATES, dtype=torch.float64)
        nearest, by_chance = (torch.zeros(COORDINATES, dtype=torch.bfloat16) for _ in range(2))
        blocks = None if OptimState8bit is None else OptimState8bit.zeros((COORDINATES,), signed=False)
        for step in range(STEPS):
            draw = truth * torch.randn(COORDINATES, generator=generator).square()
            exact = beta * exact + (1 - beta) * draw
            nearest = (beta * nearest.float() + (1 - beta) * draw).bfloat16()
            average(by_chance, draw, beta2=beta, key=key_of_parameter(step * 7919 * 2**33 + step, 0))
            if blocks is not None:
                blocks.copy_(beta * blocks.dequantize() + (1 - beta) * draw)
        rows = {"bfloat16, nearest": nearest.float(), "bfloat16, by chance": by_chance.float()}
        if blocks is not None:
            rows["8 bits in blocks, nearest"] = blocks.dequantize()
        for name, found in rows.items():
            ratio = found.double() / exact
            low, middle, high = ratio.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
            print(f"decay {beta}  {name:26s} {middle:.3f}  ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
