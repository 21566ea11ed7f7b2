import dataclasses
import socket

import pytest
import torch

from sophia.lab.config.run import Model
from sophia.lab.models.build import gpt2, parameter_count
from sophia.lab.support.dataclass_json import from_json, to_json
from sophia.lab.support.errors import UsageError

SMALL = Model(layers=1, width=16, heads=2, context=8)


def test_weights_are_a_function_of_the_seed():
    """Else contenders of one seed would not start from the same point."""
    torch.manual_seed(1)
    one = gpt2(SMALL, seed=5).state_dict()
    torch.manual_seed(2)
    two, other = gpt2(SMALL, seed=5).state_dict(), gpt2(SMALL, seed=6).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


def test_the_global_random_state_is_left_alone():
    """Else making a model would change whatever is drawn after it."""
    before = torch.get_rng_state()
    gpt2(SMALL, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_fetched_and_nothing_is_printed(monkeypatch, capfd):
    """Else the first run would need a network, or begin with warnings that nobody can act on."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    model = gpt2(SMALL, seed=1)
    x = torch.randint(4096, (2, 8))
    model(input_ids=x, labels=x).loss.backward()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_the_loss_is_the_mean_over_all_but_the_first_token():
    """Else bits per byte and the count of predictions would not fit the loss."""
    model = gpt2(SMALL, seed=1)
    x = torch.randint(4096, (3, 8))
    out = model(input_ids=x, labels=x)
    mean = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 4096), x[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, mean)


def test_tied_weights_count_once_and_there_is_no_dropout():
    """Else FLOPs would be wrong, or the replay of a forward would differ from it."""
    model = gpt2(SMALL, seed=1)
    assert parameter_count(model) < 4096 * 16 * 1.2
    x = torch.randint(4096, (1, 8))
    assert torch.equal(model(input_ids=x).logits, model(input_ids=x).logits)


def test_attention_is_scaled_by_layer_only_if_asked():
    """Else stability would be measured against itself, or old runs would lose their names."""
    plain = Model(layers=3, width=16, heads=2, context=8)
    scaled = dataclasses.replace(plain, scale_attention_by_layer=True)
    ratios = [
        b.attn.scaling / a.attn.scaling
        for a, b in zip(gpt2(plain, seed=1).transformer.h, gpt2(scaled, seed=1).transformer.h, strict=True)
    ]
    assert ratios == pytest.approx([1, 1 / 2, 1 / 3])
    x = torch.randint(4096, (2, 8))
    ends = [gpt2(m, seed=1)(input_ids=x, labels=x).loss.item() for m in (plain, scaled)]
    assert ends[0] != ends[1]
    assert "scale_attention_by_layer" not in to_json(plain)
    assert from_json(Model, to_json(scaled)) == scaled


def test_initial_weights_are_scaled_where_it_is_asked_and_nowhere_else():
    """Else attention would not begin as the experiment on stability says, or old runs would lose names."""
    plain = Model(layers=2, width=16, heads=2, context=8)
    large = dataclasses.replace(plain, initial_scale=4.0, initial_query_key_scale=16.0)
    before, after = (dict(gpt2(m, seed=1).named_parameters()) for m in (plain, large))
    for name, weights in before.items():
        factor = 1.0 if weights.ndim == 1 else 4.0
        expected = weights.detach() * factor
        if name.endswith("attn.c_attn.weight"):
            expected[:, :32] *= 16  # queries and keys; values as the rest
        assert torch.equal(after[name], expected), name
    assert to_json(plain).keys() == to_json(Model()).keys()
    assert not {"initial_scale", "initial_query_key_scale"} & to_json(plain).keys()
    assert from_json(Model, to_json(large)) == large
    with pytest.raises(UsageError, match="a neox is not built with them"):
        dataclasses.replace(large, kind="neox")
