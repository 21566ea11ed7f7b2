"""docs/hosts/skorch.md: named parameters and no model; forward and backward in a closure."""

import pytest
from pages import refreshed, run
from small_models import Classifier, examples

skorch = pytest.importorskip("skorch", reason="needs skorch (extra [hosts])")

from sophia import Sophia  # noqa: E402

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


def test_settings_go_through_and_probabilities_are_refused():
    """The default criterion of skorch, which takes the logarithm of what the module returns."""
    x, y = inputs_and_labels(16)

    class Probabilities(Classifier):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    net = skorch.NeuralNetClassifier(
        Probabilities, optimizer=Sophia, optimizer__rule="damped", train_split=None, verbose=0
    )
    with pytest.raises(RuntimeError, match="probabilities"):
        net.fit(x, y)
    assert net.optimizer_.param_groups[0]["rule"] == "damped"
