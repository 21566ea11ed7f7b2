"""Marks for tests of what a torch does not have yet: they skip there, and say from which one on it is."""

import re

import pytest
import torch

HERE = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))


def torch_from(version, what):
    """Skip before ``version`` ("2.9"), which is the first that has ``what``."""
    wanted = tuple(map(int, version.split(".")))
    return pytest.mark.skipif(wanted > HERE, reason=f"torch {version} is the first that has {what}")


MUON = torch_from("2.9", "torch.optim.Muon")


def names_of(contenders):
    """The names, to be parametrized over."""
    return [pytest.param(name, marks=MUON) if name == "muon" else name for name in contenders]


def skip_if_probes_are_others():
    """Skip what holds Hutchinson's stored numbers where torch draws other ones: 2.6 does."""
    drawn = torch.empty(8).bernoulli_(generator=torch.Generator().manual_seed(5)).tolist()
    if drawn != [1, 0, 1, 1, 1, 0, 0, 1]:
        pytest.skip("bernoulli_ of this torch draws others than that of the records")
