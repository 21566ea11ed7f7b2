"""Stochastic rounding: right in the mean, at the right odds, and noise that depends on its key alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophia.step.rounding import key_of_parameter, moved, noise, store

N = 2**16


def key(number):
    return key_of_parameter(0x0123456789ABCDEF, number)


def rounded(value, number=0, *, upper=False, count=N):
    target = torch.empty(count, dtype=torch.bfloat16)
    store(target, torch.full((count,), value), key(number), upper=upper)
    return target.double()


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize(
    "value", [1.001, -1.001, 3.0e-7, 1.99999, -65.3, 1e-39, 2.0**-126 * 0.999, 1e38, 0.02 + 6e-5]
)
def test_the_mean_is_the_number(value, upper):
    """A rounding that drifts: m and h would tend to another average than that of what went in.

    65536 draws of a variable on two neighbours: its mean has a standard deviation of at most gap / 512. Five
    of them, over 18 cases, are exceeded by chance once in 100,000 runs.
    """
    found = rounded(value, upper=upper)
    exact = float(torch.tensor(value))
    low, high = found.min(), found.max()
    gap = float(high - low)
    assert len(found.unique()) == 2
    assert low < exact < high
    share = (exact - float(low)) / gap
    deviation = gap * math.sqrt(share * (1 - share) / N)
    assert abs(float(found.mean()) - exact) < 5 * deviation


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -0.15625, 2.0**-133, math.inf, -math.inf, 3.3895313892515355e38]
)
def test_what_fits_is_kept(value):
    """A weight that no gradient reaches would wander; an infinity would become NaN."""
    found = rounded(value, count=100)
    assert torch.equal(found, torch.full((100,), value, dtype=torch.float64))
    assert math.copysign(1.0, float(found[0])) == math.copysign(1.0, value)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000 - 2**32, 0x7FFFFFFF, -1, 0x7F800001])
def test_nan_stays_nan(bits):
    """Bits added to a NaN's can carry over: broken training would go on as if nothing had happened."""
    target = torch.empty(1000, dtype=torch.bfloat16)
    store(target, torch.full((1000,), bits, dtype=torch.int32).view(torch.float32), key(0))
    assert target.isnan().all()


def test_without_a_key_to_nearest():
    """Ties and all: as torch rounds."""
    values = torch.randn(1000)
    target = torch.empty(1000, dtype=torch.bfloat16)
    store(target, values, None)
    assert torch.equal(target, values.bfloat16())
    target = torch.empty(1000)
    store(target, values, key(0))
    assert torch.equal(target, values)


# ---- the noise


def bits(words):
    """A 0/1 matrix, one column a bit."""
    return torch.stack([(words >> i) & 1 for i in range(32)], dim=1).double()


@pytest.mark.parametrize(
    "words",
    [
        noise(key(0), N),  # along the elements of a tensor
        torch.cat([noise(key(i), 1) for i in range(N // 8)]),  # the first element of each parameter
        torch.cat([noise(moved(key_of_parameter(i * 7919, 3), 5), 1) for i in range(N // 8)]),  # keys near 0
    ],
    ids=["elements", "parameters", "keys"],
)
def test_every_bit_is_fair_and_no_two_agree(words):
    """A bit that is rarely set rounds one way; two bits that go together make some roundings impossible.

    For n draws the mean of a fair bit, and the correlation of two, have a standard deviation of about
    1 / (2 sqrt n) and 1 / sqrt n; six of them are exceeded by chance once in a million cases.
    """
    ones = bits(words)
    n = len(ones)
    assert ((ones.mean(0) - 0.5).abs() < 6 * 0.5 / math.sqrt(n)).all()
    correlation = torch.corrcoef(ones.T) - torch.eye(32, dtype=torch.float64)
    assert correlation.abs().max() < 6 / math.sqrt(n)


def test_neighbours_steps_and_parameters_are_unrelated():
    """Noise that comes back in the next element, step or parameter does not average out."""
    base = noise(key(0), N).double()
    others = {
        "next element": noise(moved(key(0), 1), N),
        "next row": noise(moved(key(0), 256), N),
        "next parameter": noise(key(1), N),
        "upper half": (noise(key(0), N) << 16).double(),
    }
    for name, other in others.items():
        assert abs(torch.corrcoef(torch.stack([base, other.double()]))[0, 1]) < 6 / 256, name


def test_the_chance_is_uniform_where_it_is_used():
    """The lower and the upper 16 bits in 256 equal bins: chi-squared with 255 degrees of freedom has mean 255
    and standard deviation 22.6.
    """
    words = noise(key(3), 2**18)
    for half in (words & 0xFFFF, (words >> 16) & 0xFFFF):
        counts = torch.bincount(half >> 8, minlength=256).double()
        statistic = float(((counts - 1024) ** 2 / 1024).sum())
        assert 255 - 6 * 22.6 < statistic < 255 + 6 * 22.6


@given(number=st.integers(0, 2**64 - 1), start=st.integers(0, 2**40), count=st.integers(1, 50))
def test_a_part_gets_the_noise_of_the_whole(number, start, count):
    """Threads, blocks and shards: the result would depend on where memory is cut."""
    whole = noise(moved(number, start), count + 7)
    assert torch.equal(whole[7:], noise(moved(number, start + 7), count))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: t.t().contiguous().t(),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],  # with gaps
        lambda t: torch.cat([t, t])[30:],
    ],
    ids=["contiguous", "transposed", "gaps", "inside"],
)
def test_layout_of_the_value_cannot_be_seen(make):
    """A sum of a transposed and a plain tensor comes out in either layout: the noise is the target's."""
    value = torch.randn(30, 40)
    results = []
    for given_value in (value, value.t().contiguous().t(), value.double()):
        target = make(torch.zeros(30, 40, dtype=torch.bfloat16))[:30]
        store(target, given_value, key(0))
        results.append(target.clone())
        assert (target.float() - value).abs().max() <= 2.0**-7 * value.abs().max()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
