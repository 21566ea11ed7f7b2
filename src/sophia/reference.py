"""Sophia-G, whole, slow and readable: Algorithms 2 and 3 of arXiv 2305.14342v4 in one plain training loop.

Read this first. Nothing of the library is used here, and a test holds the library to it: with the same model,
data and labels it has the same weights and the same h after every step, to rounding
(``tests/test_reference.py``). ``python -m sophia.reference`` trains a tiny model in seconds and prints its
losses.

The symbols are the paper's. theta is all weights as one vector; g its gradient, m the moving average of g; h
the moving average of h_hat, an estimate of the diagonal of the curvature; B the number of predictions
averaged in the loss; eta the learning rate, lambda the weight decay; k the number of steps between two
estimates. theta, g, m and h have one length, and everything goes element by element.

What ``sophia.Sophia`` does otherwise, and where::

    here                                     the library
    ---------------------------------------  -------------------------------------------------------------
    one label drawn for a prediction         differences of pairs of labels: same mean, less noise, cheaper
                                             (likelihoods/categorical.py; Categorical(pairs=0) draws one)
    h_hat from the whole batch               from an eighth of its rows or micro-batches (refresh/replay.py,
                                             fraction=1/8; the paper takes half)
    the loop calls the model for h_hat       step() runs recorded forwards again (refresh/recorder.py) and
                                             leaves no trace (refresh/sandbox.py), so loops need no change
    B is the length of one batch             counted over micro-batches (refresh/replay.py) and processes
                                             (distributed/collectives.py)
    B * g_hat^2                              (sqrt(B) * g_hat)^2, the factor put in before the backward, in
                                             closed form (curvature/gauss_newton_bartlett.py)
    every weight is decayed                  matrices alone, if it is given the model (step/groups.py)
    a line of Python for an equation         one compiled pass over memory (step/kernels/)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

__all__ = ["gauss_newton_bartlett", "gradient", "sample_labels", "train"]

IGNORED = -100
"""The label of padding: no prediction, neither in the loss nor in B."""


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    """The gradient of a scalar in theta, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def sample_labels(probabilities: Tensor) -> Tensor:
    """One class for each row of ``(B, V)``, drawn with its probability."""
    return torch.multinomial(probabilities, 1).squeeze(1)


def gauss_newton_bartlett(
    model: nn.Module, x: Tensor, y: Tensor, draw: Callable[[Tensor], Tensor] = sample_labels
) -> Tensor:
    """Algorithm 2: h_hat, an estimate of the diagonal of the Gauss-Newton matrix of the mean loss.

    It is never negative, and right in the mean because the labels are the model's own. The training labels y
    tell padding alone.
    """
    logits = model(x)[y != IGNORED]  # f(theta, x_b) for b = 1, ..., B
    B = len(logits)
    y_hat = draw(torch.softmax(logits.detach(), -1))  # y_hat_b ~ softmax(f(theta, x_b))
    g_hat = gradient(cross_entropy(logits, y_hat), model)  # grad of 1/B sum_b loss(f(theta, x_b), y_hat_b)
    return B * g_hat * g_hat


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    eta: float = 6e-4,
    beta1: float = 0.96,
    beta2: float = 0.99,
    gamma: float = 0.05,
    eps: float = 1e-12,
    lambda_: float = 0.1,
    k: int = 10,
    draw: Callable[[Tensor], Tensor] = sample_labels,
) -> Iterator[tuple[float, Tensor]]:
    """Algorithm 3: change the weights of a model that returns logits; yield L_t and h_t of every step."""
    theta = parameters_to_vector(model.parameters()).detach()
    m = torch.zeros_like(theta)
    h = torch.zeros_like(theta)
    for t, (x, y) in enumerate(batches, start=1):
        loss = cross_entropy(model(x)[y != IGNORED], y[y != IGNORED])  # L_t(theta_t)
        g = gradient(loss, model)
        m = beta1 * m + (1 - beta1) * g
        # Before the step and at the same theta_t, so that the very first step knows a curvature.
        if (t - 1) % k == 0:  # t mod k = 1; else h_t = h_{t-1}
            h_hat = gauss_newton_bartlett(model, x, y, draw)
            h = beta2 * h + (1 - beta2) * h_hat
        theta = theta - eta * lambda_ * theta
        # max and clip: where h is zero or tiny, the step is eta * sign(m), and nowhere is it longer.
        theta = theta - eta * (m / (gamma * h).clamp(min=eps)).clamp(-1, 1)
        vector_to_parameters(theta, model.parameters())  # theta_{t+1}
        yield loss.item(), h


def main() -> None:
    """Learn to count: the next character of "0 1 2 3 ... 2999" from the ten before it."""
    torch.manual_seed(0)
    characters = "0123456789 "
    text = torch.tensor([characters.index(c) for c in " ".join(map(str, range(3000)))])
    windows = text.unfold(0, 11, 1)
    model = nn.Sequential(
        nn.Embedding(11, 16), nn.Flatten(), nn.Linear(10 * 16, 128), nn.Tanh(), nn.Linear(128, 11)
    )
    rows = torch.randint(len(windows), (300, 256))
    batches = ((windows[i, :-1], windows[i, -1]) for i in rows)
    for t, (loss, _) in enumerate(train(model, batches, eta=3e-3), start=1):
        if t == 1 or t % 50 == 0:
            print(f"step {t:3d}  loss {loss:.3f}")


if __name__ == "__main__":
    main()
