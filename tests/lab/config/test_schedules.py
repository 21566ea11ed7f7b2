import pytest

from sophia.lab.config.run import Schedule
from sophia.lab.config.schedules import cosine, factor, warmup_stable_decay


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("warmup", [0, 1, 10, 60])
def test_never_zero_in_warmup_never_above_one_ends_at_the_floor(kind, steps, warmup):
    """Else the first step would be lost, or budgets would end at different learning rates."""
    schedule = Schedule(kind=kind, warmup=warmup, floor=0.1)
    values = [factor(schedule, step, steps=steps) for step in range(steps)]
    assert all(0 < v <= 1 for v in values)
    if steps > 2:
        assert values[-1] == pytest.approx(0.1)
        assert max(values) == pytest.approx(1)


def test_stable_decay_is_the_same_for_every_budget_until_it_decays():
    """Else runs of several budgets could not share their first part."""
    short = [warmup_stable_decay(s, steps=50, warmup=5, floor=0.0, decay=0.2) for s in range(40)]
    long = [warmup_stable_decay(s, steps=100, warmup=5, floor=0.0, decay=0.2) for s in range(40)]
    assert short == long


def test_cosine_falls_all_the_way():
    """Else the end of a run would not be its best point."""
    values = [cosine(s, steps=30, warmup=3, floor=0.05) for s in range(30)]
    assert values[3:] == sorted(values[3:], reverse=True)
