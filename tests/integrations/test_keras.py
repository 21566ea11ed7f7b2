"""docs/hosts/keras.md: a model of Keras is a module, with state in parameters that are not trained."""

import os

import numpy as np
import pytest
import torch
from pages import refreshed, run, watching
from small_models import CLASSES, INPUTS, batches, examples

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="needs keras (extra [hosts])")

from sophia import Sophia  # noqa: E402

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "torch", reason="Keras runs on another backend here"),
    pytest.mark.filterwarnings("ignore"),  # what Keras says of itself
]


def layers(normalised):
    keras.utils.set_random_seed(1)
    middle = [keras.layers.BatchNormalization()] if normalised else []
    return [
        keras.Input((INPUTS,)),
        keras.layers.Dense(8),
        *middle,
        keras.layers.Activation("tanh"),
        keras.layers.Dense(CLASSES),
    ]


def check(steps, counted):
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {counted}


def test_page_of_a_loop():
    """A module that is called with ``training=`` and makes a layer's parameters by name."""
    _, steps = run(
        "keras.md", "A loop of torch", model=keras.Sequential(layers(True)), batches=batches(96, 4)
    )
    check(steps, 4)  # one of two micro-batches


def test_page_of_fit():
    """The trainer of Keras puts the model in training mode and calls its ``train_step``."""
    x, y = (np.asarray(t) for t in examples(48))
    names, steps = run("keras.md", "fit, with a train_step", layers=layers(False), inputs=x, labels=y)
    check(steps, 1)  # one of four rows
    assert names["model"].sophia.stats()["share"] == 0.25


def test_a_refresh_leaves_moving_statistics_as_they_are():
    """Statistics that Keras keeps in parameters, moved once more by each refresh."""
    x, y = examples(32)
    model = keras.Sequential(layers(True))
    opt = Sophia(model, update_every=1)
    before = [v.value.clone() for v in model.non_trainable_variables]
    torch.nn.functional.cross_entropy(model(x, training=True), y).backward()
    moved = [v.value.clone() for v in model.non_trainable_variables]
    assert sum(not torch.equal(a, b) for a, b in zip(before, moved, strict=True)) >= 2
    with watching() as steps:
        opt.step()
    assert refreshed(steps) == [0]
    assert all(torch.equal(a, v.value) for a, v in zip(moved, model.non_trainable_variables, strict=True))


def test_probabilities_are_refused():
    """``from_logits=False``, the default of Keras, with a softmax in the last layer."""
    x, y = examples(32)
    model = keras.Sequential([*layers(False), keras.layers.Softmax()])
    opt = Sophia(model)
    keras.losses.SparseCategoricalCrossentropy()(y, model(x, training=True)).backward()
    with pytest.raises(RuntimeError, match="probabilities"):
        opt.step()
