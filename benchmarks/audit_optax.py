"""The audit of `sophia audit`, for optax's Sophia: the same problem, as numbers, in JAX.

    pip install jax optax
    python benchmarks/audit_optax.py [--json results/audits/optax-sophia.json]

``optax.contrib.sophia`` differentiates the objective that is handed to ``update`` again (Hutchinson, signs).
As in ``sophia.lab.jobs.audit``, h is read from outside: many refreshes with learning rate 0, then one step
with a known tiny gradient, momentum off and learning rate 1, which moves a coordinate by ``g / (gamma h)``.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sophia.lab.jobs.audit import BETA2, PARTS, REFRESHES, Finding, Problem, conclusion
from sophia.lab.support.files import write_json

jax.config.update("jax_enable_x64", True)
GAMMA, TINY = 0.01, 1e-9
SETTINGS: dict[str, Any] = {"b1": 0.0, "b2": BETA2, "gamma": GAMMA, "eps": 1e-12, "weight_decay": 0.0}

problem = Problem()
X, Y = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.y.numpy())
WEIGHT = jnp.asarray(problem.linear.weight.detach().numpy())
TRUTH = problem.truth().numpy()
SIZE = len(X) // PARTS


def loss(weight: jax.Array, rows: slice = slice(None)) -> jax.Array:
    """Mean cross-entropy on the training labels."""
    logits = X[rows] @ weight.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y[rows]).mean()


def last(weight: jax.Array) -> jax.Array:
    """The loss of the last of eight micro-batches, divided by their number for the gradient's sake."""
    return loss(weight, slice(-SIZE, None)) / PARTS


def read(
    objective: Callable[[jax.Array], jax.Array] | None, *, every: int = 1
) -> np.ndarray[Any, Any] | None:
    """The h after many refreshes with this objective; None if every coordinate takes a full step."""
    given = {} if objective is None else {"obj_fn": objective}

    def optimizer(lr: float) -> Any:
        return optax.contrib.sophia(lr, update_interval=every, **SETTINGS)

    still, probing = optimizer(0.0), optimizer(1.0)
    step = jax.jit(lambda state: still.update(jax.grad(loss)(WEIGHT), state, WEIGHT, **given)[1])
    state = still.init(WEIGHT)
    for _ in range(REFRESHES):
        state = step(state)
    moved, _ = probing.update(jnp.full_like(WEIGHT, TINY), state, WEIGHT, **given)
    size = np.abs(np.asarray(moved))
    return None if size.min() > 1 - 1e-6 else TINY / size / GAMMA


CASES: tuple[tuple[str, bool, Callable[[], np.ndarray[Any, Any] | None]], ...] = (
    ("update(..., obj_fn=loss of the batch)", True, lambda: read(loss)),
    ("update() without obj_fn", False, lambda: read(None)),
    ("obj_fn of the last micro-batch, loss / 8", False, lambda: read(last)),
    ("obj_fn summed over tokens", False, lambda: read(lambda weight: loss(weight) * Y.size)),
)


def finding(name: str, right: bool, run: Callable[[], np.ndarray[Any, Any] | None]) -> Finding:
    """One way of calling it."""
    try:
        found = run()
    except Exception as error:  # a class that fails in a loop has failed the case, not the audit
        return Finding(name, right, None, None, f"{type(error).__name__}: {error}"[:200])
    if found is None:
        return Finding(name, right, 0.0, None)
    correlation = float(np.corrcoef(found.ravel(), TRUTH.ravel())[0, 1])
    return Finding(name, right, float(found.sum() / TRUTH.sum()), correlation)


def main() -> None:
    """Audit, print, and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    findings = [finding(*case) for case in CASES]
    for f in findings:
        print(f.case, "right" if f.right else "mistake", f.ratio, f.correlation, f.verdict, f.note, sep=" | ")
    if options.json is not None:
        rows = [{**dataclasses.asdict(f), "verdict": f.verdict} for f in findings]
        name = f"optax.contrib:sophia {optax.__version__}"
        write_json(options.json, {"optimizer": name, "conclusion": conclusion(findings), "findings": rows})


if __name__ == "__main__":
    main()
