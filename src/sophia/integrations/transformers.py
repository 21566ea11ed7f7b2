"""Hugging Face's Trainer: the numbers of ``Sophia.stats()`` in its logs.

Sophia itself needs nothing of this: ``Trainer(..., optimizers=(Sophia(model), None))``.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from sophia import Sophia

__all__ = ["SophiaCallback"]


class SophiaCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Adds ``sophia/unclipped``, ``sophia/B`` and the rest of ``Sophia.stats()`` to each training log.

    The Trainer calls its callbacks one after the other, and puts those that report to W&B, TensorBoard and
    the like before yours. ``SophiaCallback.add_to(trainer)`` puts this one first, so that they see its
    numbers; given as ``callbacks=[SophiaCallback()]`` they reach ``log_history`` and the progress bar alone.

    On several ranks the shares are those of the first rank's coordinates, as no rank may wait in a log.

    >>> import torch
    >>> from transformers import TrainerState
    >>> state, logs = TrainerState(is_world_process_zero=True), {"loss": 1.4}
    >>> opt = Sophia(torch.nn.Linear(3, 4))
    >>> SophiaCallback().on_log(None, state, None, logs=logs, optimizer=opt)
    >>> sorted(logs)[:4]
    ['loss', 'sophia/B', 'sophia/age', 'sophia/eps_limited']
    """

    @classmethod
    def add_to(cls, trainer: Trainer) -> SophiaCallback:
        """Put a callback before all others of ``trainer``; return it."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise TypeError if the Trainer's optimizer is not Sophia."""
        _sophia_in(kwargs.get("optimizer"))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Add the numbers to ``logs``, and to the entry of ``state.log_history`` that was made of them."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return  # an evaluation, or the summary at the end
        numbers = {f"sophia/{name}": value for name, value in _sophia_in(kwargs["optimizer"]).stats().items()}
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)


def _sophia_in(optimizer: Any) -> Sophia:
    """The Sophia inside the wrappers that accelerate and DeepSpeed put around an optimizer."""
    inner = optimizer
    while not isinstance(inner, Sophia) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Sophia):
        raise TypeError(
            "SophiaCallback logs Sophia.stats(), but the optimizer of this Trainer is "
            f"{type(inner).__name__}: pass optimizers=(Sophia(model, lr=...), None)"
        )
    return inner
