"""docs/hosts/litgpt.md: a class path and settings in a configuration, and no model."""

import pytest
import torch
from pages import refreshed, run, watching

litgpt = pytest.importorskip("litgpt", reason="needs litgpt (extra [hosts-pretraining])")

from lightning.fabric import Fabric  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer  # noqa: E402

from tiny import LabelsFromLogits, T, V, data, estimate_in_state, oracle, relative_error  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def config():
    return litgpt.Config(
        block_size=T,
        vocab_size=V,
        padded_vocab_size=V,
        n_layer=2,
        n_head=4,
        n_embd=32,
        intermediate_size=64,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )


@pytest.mark.parametrize("chunk_size", [0, 4], ids=["whole", "chunked head"])
def test_page(chunk_size):
    """A module behind Fabric's wrapper, and logits in a list of which one chunk is counted."""
    x, y = data(96)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    _, steps = run("litgpt.md", "In Python", config=config(), batches=batches, chunk_size=chunk_size)
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4 * T}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_its_own_pretraining(compiled, tmp_path):
    """LitGPT's loop: compiled before Fabric's wrapper, clipped, its own schedule, validations between."""
    from litgpt import pretrain

    torch._dynamo.reset()
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(0)
    model = litgpt.GPT(config())
    model = fabric.setup(torch.compile(model, backend="eager") if compiled else model)
    model.max_seq_length = T
    chosen = {"class_path": "sophia.Sophia", "init_args": {"lr": 3e-4}}
    opt = fabric.setup_optimizers(instantiate_torch_optimizer(chosen, model.parameters(), fused=False))
    ids, last = data(48)
    loader = torch.utils.data.DataLoader(torch.cat([ids, last[:, -1:]], 1), batch_size=2)
    state = {"model": model, "optimizer": opt, "iter_num": 0, "step_count": 0}
    train = TrainArgs(
        global_batch_size=4,
        micro_batch_size=2,
        max_tokens=24 * 2 * T,
        max_norm=1.0,
        lr_warmup_steps=4,
        min_lr=1e-5,
        save_interval=None,
        log_interval=4,
    )
    evaluation = EvalArgs(interval=4, max_iters=1, final_validation=False)
    with watching() as steps:
        pretrain.fit(fabric, 1, state, loader, loader, tmp_path, None, train, evaluation)
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {2 * T}


def test_h_of_a_chunked_head_is_the_oracle():
    """Chunks of logits that are left out, or counted with another weight."""
    torch.manual_seed(1)
    model, (x, y) = litgpt.GPT(config()).train(), data(8, padded=True)
    expected, count = oracle(model, x, y >= 0, lambda m, x: m(x))
    settings = {"lr": 0.0, "weight_decay": 0.0, "fraction": 1.0, "likelihood": LabelsFromLogits()}
    opt = instantiate_torch_optimizer(
        {"class_path": "sophia.Sophia", "init_args": settings}, model.parameters()
    )
    logits = model(x, lm_head_chunk_size=4)
    assert len(logits) == 4
    chunked_cross_entropy(logits, y, ignore_index=-1).backward()
    opt.step()
    assert opt.stats()["B"] == count
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
