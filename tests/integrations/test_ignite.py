"""docs/hosts/ignite.md: its trainer clears gradients before the forward, and steps by its own count."""

import pytest
from pages import refreshed, run
from small_models import Classifier, batches

pytest.importorskip("ignite", reason="needs pytorch-ignite (extra [hosts])")


def test_page():
    """A forward forgotten with the gradients that were cleared before it, or a schedule that is not seen."""
    names, steps = run("ignite.md", "A supervised trainer", model=Classifier(), batches=batches(96, 4))
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4}
    assert steps[0].lr < steps[-1].lr == 6e-4
    assert names["opt"].stats()["share"] == 0.5
