"""One thread a test process (two run side by side), a fixed global seed, no clock in hypothesis."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("default run", deadline=None, derandomize=True, database=None)
settings.load_profile("default run")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
