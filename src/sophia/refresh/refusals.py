"""What is refused before a refresh begins: recordings, parameters and wrappers that it cannot use."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sophia.distributed.wrappers import parameters_at_rest
from sophia.refresh.recorder import Recorder
from sophia.refresh.recording import trained
from sophia.refresh.replay import usable

__all__ = ["BY_HAND", "check_ownership", "check_recorded"]

BY_HAND = (
    "By hand: mode='manual' and, every ten steps or so, `with opt.hessian_pass() as hp:` with "
    "hp.sampled_loss(logits).backward() where there are logits, or with estimator='hutchinson' and "
    "hp.add(loss, count), which needs the loss alone"
)
"""What to write where forwards cannot be recorded."""
_OF_ROWS = ("grad_sample", "_norm_sample")  # a gradient, or its norm, for every example


def check_recorded(recorder: Recorder, step: int) -> None:
    """Raise RuntimeError if no training forward was recorded since the last step, or none that is of use."""
    if not trained(recorder.recordings):
        # Ghost clipping clears, between its two backwards, what the first has come through.
        check_no_gradients_of_rows(recorder.model)
        own = type(recorder.model).__call__ is not nn.Module.__call__
        passes = ", or its own __call__ passes by the hooks of torch.nn.Module (as those of GPyTorch do)"
        raise RuntimeError(
            f"a Hessian refresh is due at step {step}, but the attached module "
            f"{type(recorder.model).__name__} ran no forward in training mode since the last step"
            f"{passes if own else ''}, and no backward came through one in evaluation mode. Pass the module "
            "that is really called and returns logits (not a LightningModule or wrapper), call "
            "model.train(), or use mode='manual', as where the loop calls another method of the module "
            f"(policy.evaluate_actions(...)), which no hook sees. {BY_HAND}"
        )
    check_no_gradients_of_rows(recorder.model)
    check_own_parameters(recorder)


def check_ownership(parameters: Sequence[Tensor], model: nn.Module) -> None:
    """Raise RuntimeError unless all parameters of the optimizer are parameters of the attached model."""
    owned = {id(parameter) for parameter in parameters_at_rest(model)}
    lost = sum(id(parameter) not in owned for parameter in parameters)
    if lost:
        raise RuntimeError(
            f"{lost} of {len(parameters)} optimizer parameters are not, or no longer, parameters of "
            f"{type(model).__name__}; a wrapper (DeepSpeed ZeRO, "
            "FSDP1 flat parameters) or a second model may have replaced them. Build Sophia after wrapping, "
            "attach(model) again, or use mode='manual'"
        )


def check_no_gradients_of_rows(model: nn.Module) -> None:
    """Raise RuntimeError if something keeps a gradient for every example on the parameters."""
    marked = sum(any(hasattr(p, name) for name in _OF_ROWS) for p in model.parameters())
    if marked:
        raise RuntimeError(
            f"{marked} parameters of {type(model).__name__} carry per-example gradients (grad_sample), as "
            "wrappers for private training leave them. A refresh would make h from raw rows, neither clipped "
            "nor noised and unknown to the privacy accountant, and would put gradients for sampled labels in "
            "the place of grad_sample. Use mode='manual', and renew h by opt.hessian_pass() on public data, "
            "with the wrapper's hooks off (Opacus: disable_hooks(), and enable_hooks() afterwards)"
        )


def check_own_parameters(recorder: Recorder) -> None:
    """Raise RuntimeError if a forward that counts did not run on the model's own parameters."""
    others = max(recording.conditions.strangers(recorder.model) for recording in usable(recorder))
    if others:
        raise RuntimeError(
            f"a training forward of {type(recorder.model).__name__} ran with other tensors in the place of "
            f"{others} of its parameters (torch.func.functional_call: inner steps, perturbed or averaged "
            "weights). Run again, it would go through the module's own, and h would be the curvature at "
            "another point. Give functional_call the module's own parameters, or use mode='manual' and make "
            "the same call inside opt.hessian_pass()"
        )
