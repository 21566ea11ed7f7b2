"""docs/hosts/ray.md: two workers, which are given the training function that stands on the page."""

import json
import os
from pathlib import Path

import pytest
from pages import refreshed, run, watching
from tiny_hosts import pairs

ray = pytest.importorskip("ray", reason="needs ray[train] (extra [hosts])")
pytest.importorskip("ray.train.torch", reason="needs ray[train] (extra [hosts])")

from tiny import GPT, T  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TESTS = Path(__file__).parents[1]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Of results, of a cluster on this machine whose workers find the tests and the library."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folders = [TESTS.parent / "src", TESTS, TESTS / "integrations", os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "OMP_NUM_THREADS": "1",
        "SEEN": str(tmp_path),
    }
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": settings})
    yield tmp_path
    ray.shutdown()


def batches_of(rank):
    """Every second row, four at a time; writes down what the worker's Sophia does between first and last."""
    x, y = next(iter(pairs(192, batch_size=192)))
    with watching() as steps:
        yield from zip(x[rank::2].split(4), y[rank::2].split(4), strict=True)
    seen = {
        "steps": [taken.step for taken in steps],
        "refreshed": refreshed(steps),
        "counted": sorted({taken.counted for taken in steps}),
    }
    Path(os.environ["SEEN"], f"{rank}.json").write_text(json.dumps(seen))


def test_page(folder):
    """A wrapper that Ray puts around the model, and a B of one worker alone."""
    run("ray.md", "A training function", model_of=GPT, batches_of=batches_of, folder=str(folder))
    for rank in range(2):
        seen = json.loads((folder / f"{rank}.json").read_text())
        assert seen["steps"] == list(range(12))
        assert seen["refreshed"] == [0, 10]
        assert seen["counted"] == [2 * 4 * T]  # one of two micro-batches, of two workers
