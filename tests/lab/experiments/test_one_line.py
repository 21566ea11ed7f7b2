"""Scripts and their one line; the oracle against torch.func; the network that is refused."""

import socket

import pytest
import torch

from sophia.lab.experiments import one_line
from sophia.lab.experiments.framework.no_network import no_network


def test_lines_are_counted():
    """A second changed line that nobody notices."""
    assert {one_line.changed(script) for script in one_line.SCRIPTS.values()} == {1}
    two = one_line.Script("a\n{optimizer}\nb", adamw="x", sophia="y\nz")
    assert one_line.changed(two) == 2


def test_the_exact_diagonal_is_the_hessians():
    """A truth that is wrong. For a softmax layer Gauss-Newton and Hessian are one."""
    x, y, weight = one_line._data()
    loss = lambda w: torch.nn.functional.cross_entropy((x @ w.T).flatten(0, 1), y.flatten())
    hessian = torch.func.hessian(loss)(weight).reshape(weight.numel(), -1).diagonal()
    found = one_line.exact(weight, slice(None))
    torch.testing.assert_close(found.flatten().float(), hessian, rtol=1e-4, atol=1e-6)


def test_a_script_that_forgets_the_refresh_is_not_right():
    """A verdict that says yes to sign momentum, or to a count that is off."""
    right = {
        "lines_changed": 1,
        "refreshes": 5.0,
        "refreshes_due": 5,
        "B": 64.0,
        "B_right": 64,
        "h_over_truth": 1.02,
        "correlation": 0.99,
        "loss_sophia": 1.0,
        "loss_at_start": 2.0,
    }
    assert one_line._right(right)
    for name, value in {"refreshes": 0.0, "B": 128.0, "h_over_truth": 0.5, "lines_changed": 2}.items():
        assert not one_line._right({**right, name: value}), name


def test_the_network_is_refused_and_what_was_tried_is_known():
    """A run that fetches something while it says that it does not."""
    with no_network() as tried, pytest.raises(OSError, match="was asked for"):
        socket.create_connection(("127.0.0.1", 9))
    assert tried == [("127.0.0.1", 9)]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 9))
