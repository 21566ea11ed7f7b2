"""docs/losses.md: its examples as they stand; and for every kind of model that B is the count of the model's
own loss, h the oracle's, and renewed on the right steps.
"""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tiny import D, LabelsFromLogits, T, V, data, estimate_in_state, oracle, relative_error

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra [lab]")

from sophia import Sophia  # noqa: E402
from sophia.curvature.exact import gauss_newton_diagonal  # noqa: E402
from sophia.refresh.replay import _drawn  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n[^#]*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
COMMON = {"vocab_size": V, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=D, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, **COMMON
        )
    )


def bart():
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=D, max_position_embeddings=T, dropout=0.0, init_std=0.2, bos_token_id=0, **sizes, **COMMON
        )
    )


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=8,
            patch_size=4,
            num_labels=7,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
    )


def bert():
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=T,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
        )
    )


def translation(seed=0):
    """Source and target of unlike, random lengths; -100 on the target's padding."""
    x, y = data(8, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    attention = (torch.arange(T)[None] < torch.randint(3, T + 1, (8,), generator=g)[:, None]).long()
    y = y[:, : T - 5].clamp(min=2)
    padding = torch.arange(T - 5)[None] >= torch.randint(2, T - 4, (8,), generator=g)[:, None]
    return {"input_ids": x, "attention_mask": attention, "labels": y.masked_fill(padding, -100)}


def images(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(8, 3, 8, 8, generator=g),
        "labels": torch.randint(0, 7, (8,), generator=g),
    }


def masked_words(seed=0):
    """15% of the words that are not padding."""
    x, _ = data(8, seed=seed)
    g = torch.Generator().manual_seed(seed + 2)
    attention = (torch.arange(T)[None] < torch.randint(5, T + 1, (8,), generator=g)[:, None]).long()
    masked = (torch.rand(x.shape, generator=g) < 0.15) & (attention == 1)
    return {"input_ids": x, "attention_mask": attention, "labels": x.masked_fill(~masked, -100)}


CASES = {
    "T5": (t5, translation),
    "BART": (bart, translation),
    "ViT": (vit, images),
    "BERT": (bert, masked_words),
}


@pytest.mark.parametrize(("make", "batch"), CASES.values(), ids=CASES)
def test_count_and_curvature_are_those_of_the_models_own_loss(make, batch):
    """Padding, unmasked words or the source's tokens counted; a shift where there is none."""
    torch.manual_seed(1)
    model, inputs = make().train(), batch()
    counted = inputs["labels"] != -100
    expected, count = oracle(model, None, counted, lambda m, _: m(**inputs).logits)
    opt = Sophia(model, fraction=1.0, likelihood=LabelsFromLogits())
    model(**inputs).loss.backward()
    opt.step()
    assert opt.stats()["B"] == count == int(counted.sum())
    assert relative_error(estimate_in_state(opt), expected) < 1e-5


def h_of(opt):
    return torch.cat(
        [
            opt.state[p]["hessian"].flatten() if opt.state.get(p) else torch.zeros(p.numel())
            for group in opt.param_groups
            for p in group["params"]
        ]
    )


@pytest.mark.parametrize(("make", "batch"), CASES.values(), ids=CASES)
def test_h_changes_on_the_steps_0_k_2k_and_no_other(make, batch):
    """A refresh that is lost or doubled in this kind of model."""
    torch.manual_seed(1)
    model = make().train()
    opt = Sophia(model, lr=1e-3, update_every=3)
    changed = []
    for step in range(8):
        before = h_of(opt)
        model(**batch(step)).loss.backward()
        opt.step()
        opt.zero_grad()
        if not torch.equal(before, h_of(opt)):
            changed.append(step)
    assert changed == [0, 3, 6]


# ---- the page


def run(title, **names):
    names = {"Sophia": Sophia, "torch": torch, **names}
    exec(compile(EXAMPLES[title], f"docs/losses.md: {title}", "exec"), names)
    return names


MODELS_OF_THE_PAGE = [
    ("Encoder and decoder (T5, BART)", translation),
    ("Images (ViT)", images),
    ("Masked words (BERT)", masked_words),
]


@pytest.mark.parametrize(
    ("title", "batch"), MODELS_OF_THE_PAGE, ids=[title for title, _ in MODELS_OF_THE_PAGE]
)
def test_examples_with_models(title, batch):
    """An example that nobody has run."""
    torch.manual_seed(0)
    batches = [batch(step) for step in range(11)]
    opt = run(title, batches=batches)["opt"]
    labels = batches[10]["labels"] != -100
    counting = labels.reshape(8, -1).any(1).tolist()
    (row,), _ = _drawn(counting, 1, (0, 10, 0, 0, "rows"))  # an eighth of eight rows, drawn at step 10
    taken = labels[row]
    assert (opt.stats()["refreshes"], opt.stats()["B"]) == (2, int(taken.sum()))


class WithValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head, self.value = nn.Embedding(V, D), nn.Linear(D, V), nn.Linear(D, 1)

    def forward(self, ids):
        hidden = torch.tanh(self.embedding(ids).cumsum(1))
        return {"logits": self.head(hidden), "value": self.value(hidden)[..., 0]}


def test_example_with_several_outputs():
    """The counts of both heads."""
    x, y = data(8, padded=True)
    valued = torch.arange(T).expand(8, T) == T - 1
    batch = (x, y.masked_fill(y < 0, -100), valued, torch.randn(8, T))
    model = WithValue()
    names = {"cross_entropy": F.cross_entropy, "mse_loss": F.mse_loss}
    opt = run("Several outputs", model=model, batches=[batch] * 11, **names)["opt"]
    assert opt.stats()["refreshes"] == 2
    (row,), _ = _drawn([True] * 8, 1, (0, 10, 0, 0, "rows"))
    assert opt.stats()["B"] == int((y[row] >= 0).sum()) + 1


def test_example_with_several_outputs_of_one_kind():
    """A second classifier that is left out."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(3, 5)

        def forward(self, images):
            return self.first(images), self.second(images)

    model = Both()
    opt = Sophia(model, fraction=1.0)
    batches = [(torch.randn(8, 3), torch.randint(0, 4, (8,)))] * 11
    names = {"opt": opt, "model": model, "batches": batches, "cross_entropy": F.cross_entropy}
    run("Several outputs of one kind", **names)
    assert (opt.stats()["refreshes"], opt.stats()["B"]) == (2, 16)


class FusedLinearCrossEntropy(torch.autograd.Function):
    """The loss from hidden states and the head's weight, a few rows of logits at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        keep = labels != -100
        loss, grad_h, grad_w = hidden.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)
        for rows in keep.nonzero()[:, 0].split(5):
            logits = hidden[rows] @ weight.T
            loss += F.cross_entropy(logits, labels[rows], reduction="sum")
            delta = torch.softmax(logits, -1) - F.one_hot(labels[rows], logits.shape[-1])
            grad_h[rows], grad_w = delta @ weight, grad_w + delta.T @ hidden[rows]
        count = keep.sum()
        ctx.save_for_backward(grad_h / count, grad_w / count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad * grad_h, grad * grad_w, None


class Fused(nn.Module):
    """A language model without logits, which shifts its labels itself or leaves that to its user."""

    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(2)
        self.embedding, self.lm_head, self.shift = nn.Embedding(V, D), nn.Linear(D, V, bias=False), shift

    def forward(self, ids, labels):
        hidden = torch.tanh(self.embedding(ids).cumsum(1))
        states, targets = (hidden[:, :-1], labels[:, 1:]) if self.shift else (hidden, labels)
        loss = FusedLinearCrossEntropy.apply(states.flatten(0, 1), self.lm_head.weight, targets.flatten())
        return {"loss": loss, "logits": None, "hidden_states": hidden}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_fused_loss(shift, given):
    """A model whose loss nobody can sample from: its output layer is found, or given by ``logits_fn``."""
    model, (x, y) = Fused(shift), data(8, padded=True)
    labels = y.masked_fill(y < 0, -100)
    counted = labels != -100
    if shift:
        counted = torch.cat([counted[:, 1:], torch.zeros(8, 1, dtype=torch.bool)], 1)
    expected, count = oracle(model, x, counted, lambda m, x: m.lm_head(m(x, labels=labels)["hidden_states"]))
    opt = Sophia(
        model,
        fraction=1.0,
        likelihood=LabelsFromLogits(),
        logits_fn=(lambda output: model.lm_head(output["hidden_states"])) if given else None,
    )
    model(x, labels=labels)["loss"].backward()
    training = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert opt.stats()["B"] == count == int(counted.sum())
    assert relative_error(estimate_in_state(opt), expected) < 1e-5
    assert all(torch.equal(a, p.grad) for a, p in zip(training, model.parameters(), strict=True))


def test_example_of_a_fused_loss():
    """The page's way, at the default eighth of the rows."""
    model, (x, y) = Fused(False), data(8, padded=True)
    labels = y.masked_fill(y < 0, -100)
    opt = run(
        "No logits: a loss alone, a fused loss, hidden states", model=model, batches=[(x, labels)] * 11
    )["opt"]
    assert opt.stats()["refreshes"] == 2
    (row,), _ = _drawn([True] * 8, 1, (0, 10, 0, 0, "rows"))
    assert opt.stats()["B"] == int((labels[row] != -100).sum())


def test_example_with_a_learned_sigma():
    """The noise of the moment, not of the start."""
    model, log_sigma = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.3))
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    opt = run("Regression: which sigma", model=model, log_sigma=log_sigma, batches=[(x, y)] * 11)["opt"]
    assert opt.stats()["refreshes"] == 2
    assert opt.stats()["B"] == 2  # two outputs of one row
    assert log_sigma.grad is not None  # and Sophia does not hold it


def test_example_of_ones_own_likelihood():
    """Draws with the seed of the generator, zero where nothing counts, and unbiased (as in test_heads.py)."""
    likelihood = run("A likelihood of your own")["NormalWithScale"]()
    outputs, mask = torch.randn(6, 2), torch.arange(6) < 4
    drawn = [
        likelihood.sampled_gradient(outputs, mask, torch.Generator().manual_seed(seed))
        for seed in range(6000)
    ]
    assert torch.equal(drawn[0], likelihood.sampled_gradient(outputs, mask, torch.Generator().manual_seed(0)))
    assert not drawn[0][4:].any()
    gradients = torch.stack(drawn)[:, :4]
    second = torch.einsum("dbi,dbj->bij", gradients, gradients) / len(drawn)
    exact = likelihood.output_curvature(outputs[:4])
    scale = exact.diagonal(dim1=1, dim2=2).sqrt()
    error = (second - exact) / (scale[:, :, None] * scale[:, None, :])
    # A product of two entries has relative deviation of at most sqrt(60 / 4 - 1) = 3.7: 6,000 draws, 4.8%.
    assert float(error.abs().max()) < 0.25
    assert float(gradients.mean(0).abs().max()) < 0.25 * float(scale.max())
    shape = gauss_newton_diagonal(lambda p: p["z"][None], {"z": torch.zeros(2)}, likelihood=likelihood)["z"]
    torch.testing.assert_close(shape, torch.tensor([1.0, 2.0]))


def test_every_example_is_run():
    """A block that no test above looks at."""
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_losses*.py"))
    assert PAGE.read_text().count("```python") == len(EXAMPLES)
    assert all(f'"{title}"' in source for title in EXAMPLES)
