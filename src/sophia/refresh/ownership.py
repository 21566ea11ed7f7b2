"""Parameters of the model that no group holds although they have a gradient, and that nobody else trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sophia.distributed.shards import local

__all__ = ["Orphans"]


class Orphans:
    """Looks, on the steps of refreshes, for parameters with a gradient that are in no group.

    Another optimizer may train them (embeddings by AdamW beside Sophia), and it may do so in its own rhythm.
    So each is looked at twice, on two refreshes: if it has not moved between them, nobody trains it.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float, float]] = {}

    def left_alone(self, model: nn.Module, held: Iterable[Tensor]) -> list[str]:
        """Names of those that have not moved since the last call."""
        ours = {id(parameter) for parameter in held}
        found = {
            name: parameter
            for name, parameter in model.named_parameters()
            if id(parameter) not in ours
            and parameter.is_leaf  # FSDP1 may show views of its flat ones
            and parameter.requires_grad
            and parameter.grad is not None
        }
        # The version counts changes in place, the sums see those through `.data`, which are not counted.
        now = {id(parameter): (parameter._version, *_sums(parameter)) for parameter in found.values()}
        before, self._seen = self._seen, now
        return [name for name, parameter in found.items() if before.get(id(parameter)) == now[id(parameter)]]


def _sums(parameter: Tensor) -> tuple[float, float]:
    """Of the entries, and of their squares: the steps of a bias before a softmax add up to zero."""
    values = local(parameter.detach()).to(torch.float64)
    return float(values.sum()), float(values.square().sum())


def in_no_group(names: list[str]) -> str:
    """What to say of them."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} parameters have a gradient and are in no group ({shown}): no optimizer has moved them "
        "since the last refresh. They were added or put in place of others after this optimizer was built "
        "(by PEFT, say), or left out of its groups. Build it after that, or call opt.add_param_group, or "
        "freeze them to mean it"
    )


def nothing_to_train(number: int, names: list[str]) -> str:
    """What to say where all parameters that an optimizer holds are frozen.

    Args:
        number: of those that it holds.
        names: of those that it does not hold and that have a gradient.
    """
    others = remedy = ""
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        others = f", while {len(names)} parameters of the model have a gradient and are in no group ({shown})"
        remedy = "Something (PEFT, say) froze the model and added to it: build this optimizer after that"
    return (
        f"all {number} parameters of this optimizer are frozen (requires_grad=False){others}: this step "
        f"trains nothing. {remedy or 'Unfreeze what shall be trained'}"
    )
