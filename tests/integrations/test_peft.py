"""docs/hosts/peft.md: state for the adapters alone, and their curvature behind a frozen model."""

import pytest
import torch
from pages import refreshed, run

peft = pytest.importorskip("peft", reason="needs peft (extra [dev])")
from tiny_hosts import COUNTED, gpt2, loader, rows  # noqa: E402

from sophia import Sophia  # noqa: E402
from tiny import LabelsFromLogits, estimate_in_state, oracle, relative_error  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_page():
    """State for frozen parameters would cost what adapters are there to save."""
    model = gpt2()
    names, steps = run("peft.md", "LoRA", model=model, loader=loader(96, batch_size=4))
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * COUNTED}
    adapters = {name: p for name, p in names["model"].named_parameters() if "lora_" in name}
    assert len(adapters) == 4
    state = names["opt"].state
    assert set(state) == set(adapters.values())
    # The first refresh saw B = 0, so A had no curvature; the second has seen both.
    assert all(bool((state[p]["hessian"] > 0).all()) for p in adapters.values())


def test_h_of_adapters_is_the_oracle():
    """Curvature that stops at the frozen layers, or counts another number of predictions."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(gpt2(), settings).train()
    ids = torch.stack([row["input_ids"] for row in rows(16)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    expected, count = oracle(model, ids, mask, lambda m, x: m(input_ids=x).logits)
    opt = Sophia(model, fraction=1.0, likelihood=LabelsFromLogits())
    for part in ids.split(4):
        (model(input_ids=part, labels=part).loss / 4).backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
    assert set(opt.state) == set(expected)
