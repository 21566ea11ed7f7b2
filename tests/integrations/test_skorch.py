"""docs/hosts/skorch.md: named parameters and no model; forward and backward in a closure."""

import pytest
import torch
from pages import refreshed, run
from small_models import Classifier, examples

skorch = pytest.importorskip("skorch", reason="needs skorch (extra [hosts])")

from sophia import Sophia  # noqa: E402
from tiny import LabelsFromLogits, estimate_in_state, oracle, relative_error  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def inputs_and_labels(number):
    x, y = examples(number)
    return x.numpy(), y.numpy()


def test_page():
    """A module that is not found, or a closure whose forward is counted twice."""
    x, y = inputs_and_labels(96)
    names, steps = run("skorch.md", "A classifier", Classifier=Classifier, inputs=x, labels=y)
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 5, 10]
    assert {taken.counted for taken in steps} == {1}  # of a micro-batch of eight rows
    assert names["net"].optimizer_.stats()["share"] == 0.125


def test_page_with_accumulation():
    """Two forwards a step, of which one is run again."""
    x, y = inputs_and_labels(96)
    names, steps = run("skorch.md", "With accumulation", Classifier=Classifier, inputs=x, labels=y)
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4}
    assert names["net"].optimizer_.stats()["gradient_scale"] == pytest.approx(1.0, abs=1e-4)


def test_probabilities_under_the_default_criterion_are_read():
    """The logarithm that skorch takes of what a module returns, and settings by their long names."""
    x, y = examples(16)

    class Probabilities(Classifier):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    settings = {"lr": 0.0, "weight_decay": 0.0, "fraction": 1.0, "likelihood": LabelsFromLogits()}
    named = {f"optimizer__{name}": value for name, value in settings.items()}
    net = skorch.NeuralNetClassifier(
        Probabilities, optimizer=Sophia, max_epochs=1, batch_size=16, train_split=None, verbose=0, **named
    )
    net.fit(x.numpy(), y.numpy())
    every = torch.ones(16, dtype=torch.bool)
    expected, count = oracle(net.module_, x, every, lambda m, x: Classifier.forward(m, x))
    assert net.optimizer_.stats()["B"] == count
    assert relative_error(estimate_in_state(net.optimizer_), expected) < 1e-5
