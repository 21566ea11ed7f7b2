"""docs/hosts/timm.md: an optimizer that timm makes by name; BatchNorm; mixed labels."""

import pytest
import torch
from pages import refreshed, run

timm = pytest.importorskip("timm", reason="needs timm and torchvision (extra [hosts-images])")

from torch.nn.functional import cross_entropy  # noqa: E402

from sophia import Sophia, SophiaWarning  # noqa: E402
from tiny import LabelsFromLogits, estimate_in_state, oracle, relative_error  # noqa: E402


def vit():
    torch.manual_seed(1)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=4
    ).train()


def images(number):
    g = torch.Generator().manual_seed(number)
    return torch.randn(number, 3, 16, 16, generator=g), torch.randint(0, 4, (number,), generator=g)


def test_page():
    """Groups of parameters without a model, rates that timm sets, an average that copies the model."""
    x, y = images(96)
    # Mixup writes into its input, so no two may be views of one tensor.
    batches = [(part.clone(), labels) for part, labels in zip(x.split(4), y.split(4), strict=True)]
    names, steps = run("timm.md", "Registered by name", model=vit(), batches=batches)
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4}
    assert steps[0].lr < steps[3].lr
    assert sorted(group["weight_decay"] for group in names["opt"].param_groups) == [0.0, 0.1]


def test_h_of_a_vision_transformer_is_the_oracle():
    """One prediction an image."""
    model, (x, y) = vit(), images(8)
    expected, count = oracle(model, x, torch.ones(8, dtype=torch.bool), lambda m, x: m(x))
    opt = Sophia(model.parameters(), lr=0.0, weight_decay=0.0, fraction=1.0, likelihood=LabelsFromLogits())
    for xs, ys in zip(x.split(4), y.split(4), strict=True):
        (cross_entropy(model(xs), ys) / 2).backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def test_statistics_of_batch_norm_are_left_and_rows_kept_together():
    """Rows cut from a batch that normalises over them, and statistics that a refresh moves."""
    torch.manual_seed(1)
    model = timm.create_model("resnet10t", num_classes=4).train()
    opt = Sophia(model.parameters(), lr=1e-3)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 4, (8,))
    cross_entropy(model(x), y).backward()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.warns(SophiaWarning, match="whole"):
        opt.step()
    assert opt.stats()["B"] == 8
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
