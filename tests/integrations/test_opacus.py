"""docs/hosts/opacus.md: refused with the reason, and the curvature of public data by hand."""

import pytest
import torch
from pages import refreshed, run
from small_models import Classifier, examples
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

opacus = pytest.importorskip("opacus", reason="needs opacus (extra [hosts])")

from sophia import Sophia  # noqa: E402
from tiny import LabelsFromLogits, estimate_in_state, oracle, relative_error  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # Opacus warns of its insecure random numbers, torch of its hooks


def loader():
    return DataLoader(TensorDataset(*examples(96)), batch_size=8)


def test_page():
    """A pass over public rows whose gradients for single rows stay in those of the training."""
    public, _ = examples(5)
    _, steps = run(
        "opacus.md", "Curvature of public data", model=Classifier(), loader=loader(), public_x=public
    )
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {5}


def test_h_of_public_data_is_the_oracle_and_leaves_no_trace():
    """The page's pass beside gradients for single rows."""
    model, (public, _) = Classifier(), examples(5)
    expected, count = oracle(model, public, torch.ones(5, dtype=torch.bool), lambda m, x: m(x))
    opt = Sophia(model, mode="manual", likelihood=LabelsFromLogits())
    private, _, batches = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=opt, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
    )
    x, y = next(iter(batches))
    cross_entropy(private(x), y).backward()
    of_rows = [p.grad_sample.clone() for p in model.parameters()]
    private.disable_hooks()
    with opt.hessian_pass() as hp:
        hp.sampled_loss(model(public)).backward()
    private.enable_hooks()
    assert all(torch.equal(a, p.grad_sample) for a, p in zip(of_rows, model.parameters(), strict=True))
    assert opt.stats()["B"] == count == 5
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


@pytest.mark.parametrize("way", ["hooks", "functorch", "ghost"])
def test_private_training_is_refused_with_the_reason(way):
    """Rows that go into h past the accountant; for ghost clipping, words about training mode."""
    model = Classifier()
    opt = Sophia(model)
    extra = {"criterion": torch.nn.CrossEntropyLoss()} if way == "ghost" else {}
    made = opacus.PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=opt,
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=way,
        **extra,
    )
    private, private_opt, loss_fn, batches = made if extra else (*made[:2], cross_entropy, made[2])
    x, y = next(iter(batches))
    loss_fn(private(x), y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"per-example gradients.*privacy accountant.*public data"):
        private_opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
