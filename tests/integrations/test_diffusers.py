"""docs/hosts/diffusers.md: a squared error of predicted noise, h against the exact diagonal."""

import pytest
import torch
from pages import refreshed, run
from small_models import ESTIMATE, mean_estimate, trace_ratio
from torch.nn.functional import mse_loss

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra [hosts])")

from oracle import gauss_newton  # noqa: E402
from sophia import Sophia  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # what diffusers says of packages that are not there
SIZE = 8


def unet(*widths):
    torch.manual_seed(1)
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=2,
        attention_head_dim=2,
    ).train()


def test_page():
    """Every number of the image is a prediction; nothing is drawn anew in the refresh."""
    images = torch.randn(96, 1, SIZE, SIZE)
    _, steps = run("diffusers.md", "Noise, predicted", model=unet(4, 8), batches=images.split(4))
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * SIZE * SIZE}


@pytest.mark.parametrize("named", [True, False], ids=["a field", "a tuple"])
def test_h_is_the_curvature_of_the_squared_error(named):
    """Noise or time steps of another forward, or a wrong scale of the squared error."""
    model = unet(4)
    images, noise, times = torch.randn(4, 1, SIZE, SIZE), torch.randn(4, 1, SIZE, SIZE), torch.arange(4) * 9

    def sample(model, data):
        output = model(data[0], data[2], return_dict=named)
        return output.sample if named else output[0]

    data = (images, noise, times)
    exact = gauss_newton(model, data, sample, lambda z, data: mse_loss(z, data[1]))
    extra = {"logits_fn": lambda output: output.sample} if named else {}
    opt = Sophia(model, likelihood="gaussian", **extra, **ESTIMATE)

    def step():
        mse_loss(sample(model, data), noise).backward()
        opt.step()
        opt.zero_grad()

    found, parameters = mean_estimate(opt, step, 64), dict(model.named_parameters())
    ratio = trace_ratio(found, ((parameters[name], diagonal) for name, diagonal in exact.items()))
    # One draw of the sum was seen to have a standard deviation of 0.20: the mean of 64 has 0.025.
    assert ratio == pytest.approx(1.0, abs=0.1)


def test_without_a_likelihood_the_first_step_refuses():
    """A squared error that is taken for a cross-entropy."""
    model = unet(4)
    opt = Sophia(model, logits_fn=lambda output: output.sample)
    images = torch.randn(4, 1, SIZE, SIZE)
    mse_loss(model(images, torch.arange(4)).sample, torch.randn_like(images)).backward()
    with pytest.raises(RuntimeError, match="gaussian"):
        opt.step()
