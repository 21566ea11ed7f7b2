"""Processes of one run: one alone, or several with a copy each (DDP) or a shard each (FSDP2).

The training loop asks a team for the few things in which these differ. `Solo` does nothing; the others need
``torch.distributed`` to be initialised, as ``torchrun`` makes it possible: see `assemble`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.training import checkpoint

__all__ = ["LAYOUTS", "Replicas", "Shards", "Solo", "assemble"]

State = dict[str, Any]
LAYOUTS = ("ddp", "fsdp2")


class Solo:
    """One process."""

    rank, size = 0, 1

    def device(self, kind: str) -> torch.device:
        """Where this process computes."""
        if kind == "cuda" and not torch.cuda.is_available():
            raise LabError(
                "This run is for a GPU, but torch sees none here. Run it with device cpu, or where a GPU is."
            )
        return torch.device(kind)

    def place(self, model: nn.Module, device: torch.device, *, precision: str) -> nn.Module:
        """The model to call, on the device."""
        return model.to(device)

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch (rows, ...)."""
        return batch

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Around each micro-batch: gradients are summed over the processes at the last one only."""
        yield

    def autocast(self, device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
        """Around each forward."""
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def mean(self, values: list[float]) -> list[float]:
        """Their means over the processes."""
        return values

    def agreed(self, stop: bool) -> bool:
        """Whether any process was asked to stop."""
        return self.mean([float(stop)])[0] > 0

    def stats(self, optimizer: Optimizer) -> dict[str, float]:
        """What an optimizer says of itself, of the whole model; nothing if it says nothing."""
        return optimizer.stats() if hasattr(optimizer, "stats") else {}

    def state(self, model: nn.Module, optimizer: Optimizer) -> State:
        """What a checkpoint holds of both."""
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def restore(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        """The inverse of ``state``."""
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path, model: nn.Module, optimizer: Optimizer, rest: State) -> None:
        """Write a checkpoint; see ``sophia.lab.training.checkpoint``."""
        checkpoint.save(folder, {**self.state(model, optimizer), **rest})

    def load(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> State | None:
        """Read the newest one, if there is any, into both; return the rest."""
        state = checkpoint.load(folder)
        if state is not None:
            self.restore(model, optimizer, state)
        return state

    def close(self) -> None:
        """Leave the group of processes."""


class _Several(Solo):
    """Base of copies and shards: collectives over all processes."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def device(self, kind: str) -> torch.device:
        super().device(kind)
        if kind == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            return device
        return torch.device(kind)

    def share(self, batch: Tensor) -> Tensor:
        if len(batch) % self.size:
            raise UsageError(
                f"a batch of {len(batch)} sequences cannot be shared equally by {self.size} processes. Use a "
                "number of processes that divides it."
            )
        return batch.chunk(self.size)[self.rank]

    def mean(self, values: list[float]) -> list[float]:
        device = "cuda" if self._dist.get_backend() == "nccl" else "cpu"
        # In float64: a sum of float32 losses over many processes would lose digits that one process keeps.
        total = torch.tensor(values, dtype=torch.float64, device=device)
        self._dist.all_reduce(total)
        return [float(v) for v in total / self.size]

    def stats(self, optimizer: Optimizer) -> dict[str, float]:
        stats = getattr(optimizer, "stats", None)
        if stats is None:
            return {}
        found: dict[str, float] = (
            stats(all_ranks=True) if "all_ranks" in inspect.signature(stats).parameters else stats()
        )
        return found

    def close(self) -> None:
        self._dist.destroy_process_group()


class Replicas(_Several):
    """A copy of the model in each process; the first one writes the checkpoint of all."""

    def place(self, model: nn.Module, device: torch.device, *, precision: str) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        with contextlib.nullcontext() if last else model.no_sync():
            yield

    def state(self, model: nn.Module, optimizer: Optimizer) -> State:
        # Without the wrapper's prefix: a run may go on alone.
        return {"model": _inside(model).state_dict(), "optimizer": optimizer.state_dict()}

    def restore(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        _inside(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path, model: nn.Module, optimizer: Optimizer, rest: State) -> None:
        if self.rank == 0:
            super().save(folder, model, optimizer, rest)
        self._dist.barrier()


class Shards(_Several):
    """A shard of every parameter in each process; each writes its own part of a checkpoint.

    ``shards-STEP/`` is what ``torch.distributed.checkpoint`` writes, ``checkpoint.pt`` names it and holds the
    rest; it is written last, so that it never names half of anything.
    """

    def place(self, model: nn.Module, device: torch.device, *, precision: str) -> nn.Module:
        if device.type == "cpu" and torch.__version__.startswith("2.6."):
            raise LabError(
                f"--layout fsdp2 on a CPU: fully_shard of torch {torch.__version__} runs on GPUs alone, as "
                "its stream of a CPU records no events. Use --layout ddp, or torch 2.7 or later."
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy()
        if precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (self.size,))
        model = model.to(device)
        for block in _blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def autocast(self, device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # the wrapper's policy casts

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def save(self, folder: Path, model: nn.Module, optimizer: Optimizer, rest: State) -> None:
        import shutil

        from torch.distributed.checkpoint.state_dict_saver import save

        name = f"shards-{rest['step']}"
        save(self.state(model, optimizer), checkpoint_id=folder / name)
        self._dist.barrier()
        if self.rank == 0:
            checkpoint.save(folder, {"shards": name, **rest})
            kept = {s["shards"] for s in checkpoint.readable(folder)}
            for old in folder.glob("shards-*"):
                if old.name not in kept:
                    shutil.rmtree(old)
        self._dist.barrier()

    def load(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> State | None:
        from torch.distributed.checkpoint.state_dict_loader import load

        rest = checkpoint.load(folder)
        if rest is None:
            return None
        if "shards" not in rest:
            raise LabError(
                f"{folder.name} was saved by a run that was not sharded. Go on with it as it was started, or "
                "delete its checkpoint.pt to begin again."
            )
        state = self.state(model, optimizer)
        load(state, checkpoint_id=folder / rest["shards"])
        self.restore(model, optimizer, state)
        return rest

    def state(self, model: nn.Module, optimizer: Optimizer) -> State:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }

    def restore(self, model: nn.Module, optimizer: Optimizer, state: State) -> None:
        from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _inside(model: nn.Module) -> nn.Module:
    """The model in its wrapper."""
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    inside = model.module
    assert isinstance(inside, nn.Module)
    return inside


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: its longest list of modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def assemble(layout: str, *, device: str) -> Solo:
    """The team of this process: ``Solo`` unless ``torchrun`` started it, then what ``layout`` names.

    Raises ``UsageError`` for a layout that is none.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"the layout is {layout!r}. Use one of {', '.join(LAYOUTS)}.")
    if "WORLD_SIZE" not in os.environ:
        return Solo()
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Replicas() if layout == "ddp" else Shards()
