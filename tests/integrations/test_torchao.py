"""docs/hosts/torchao.md: layers that round in the forward, and weights that are kept in eight bits."""

import pytest
import torch
from pages import refreshed, run, watching
from tiny_hosts import pairs

torchao = pytest.importorskip("torchao", reason="needs torchao (extra [hosts])")

from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_  # noqa: E402

from sophia import Sophia  # noqa: E402
from tiny import (  # noqa: E402
    GPT,
    LabelsFromLogits,
    T,
    data,
    estimate_in_state,
    oracle,
    relative_error,
    weights_in_means,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def test_page():
    """Layers put into the model before Sophia is built, which round what goes through them."""
    names, steps = run(
        "torchao.md", "Quantization-aware training", model=GPT(tied=False), batches=pairs(96, batch_size=4)
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}
    assert "Int8" in type(names["model"].head.weight).__name__


def test_h_through_rounding_is_the_oracle():
    """Another slope of the rounding than that of the training's backward."""
    from torchao.quantization.qat import QATConfig

    base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    model, (x, y) = GPT(tied=False), data(padded=True)
    quantize_(model, QATConfig(base, step="prepare"))
    weights = weights_in_means(y >= 0, 4)[y >= 0].float() / 4
    expected, count = oracle(model, x, y >= 0, weights=weights)
    opt = Sophia(model, lr=0.0, weight_decay=0.0, fraction=1.0, likelihood=LabelsFromLogits())
    for part in zip(x.split(4), y.split(4), strict=True):
        (model(*part)[1] / 4).backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


@pytest.mark.parametrize("what", ["Int8MixedPrecisionTrainingConfig", "int8_weight_only_quantized_training"])
def test_training_in_eight_bits(what):
    """Weights of another kind of tensor, which cannot be compared with each other."""
    prototypes = pytest.importorskip("torchao.prototype.quantized_training")
    model = GPT(tied=False, layers=1)
    quantize_(model, getattr(prototypes, what)())
    opt = Sophia(model, lr=1e-3)
    with watching() as steps:
        for number, (x, y) in enumerate(pairs(48, batch_size=2), start=1):
            (model(x, y)[1] / 2).backward()
            if number % 2 == 0:
                opt.step()
                opt.zero_grad()
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert all(type(state["hessian"]) is torch.Tensor for state in opt.state.values())
