"""Options of `sophia pretrain`; implemented in ``sophia.lab.jobs.pretrain``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sophia.lab.config.field_types import Device

__all__ = ["Pretrain"]


@dataclass(frozen=True)
class Pretrain:
    """Train a model of the paper's sizes on a folder of token files, alone or under torchrun.

    For instance: torchrun --nproc-per-node 8 --no-python sophia pretrain gpt2-125m --contender sophia-g
    --tokens FOLDER. A run that was stopped goes on with the same command. Nothing is downloaded.
    """

    recipes: Positional[tuple[str, ...]] = ()
    """Recipes: gpt2-125m, gpt2-355m, gpt2-540m, gpt2-770m, neox-1.5b, neox-6.6b, or a TOML file of your own.
    One, to train; any number, or none for all, with --forecast.
    """
    forecast: bool = False
    """Train nothing: print parameters, FLOPs and memory."""
    tokens: Path | None = None
    """Folder with train.bin and val.bin, 16-bit token ids."""
    contender: str = "sophia-g"
    """Name of a contender of the recipe."""
    seed: int = 1
    """Decides initialisation, order of the data, and the optimizer's own draws."""
    steps: int | None = None
    """Optimizer steps, with a whole schedule; the recipe's unless given."""
    micro_batches: int = 1
    """Parts into which the batch of a process is cut."""
    layout: str = "ddp"
    """Of several processes: ddp (a copy each) or fsdp2 (a shard each)."""
    recompute: bool = False
    """Recompute the activations of the blocks in the backward: less memory, a third more compute."""
    out: Path = Path("runs")
    """Folder in which the run gets a folder of its own, named by its configuration."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    device: Device = "cuda"
    """cpu or cuda."""
    tracker: tuple[str, ...] = ()
    """Where the curves go as well: tensorboard, wandb (offline unless WANDB_MODE says otherwise), trackio, or
    module:Class of your own. May be repeated.
    """
    devices: int = 1
    """For --forecast: devices that share the work."""

    def run(self, command: str) -> int:
        """Print the forecast, or train."""
        from rich.console import Console

        from sophia.lab.jobs.pretrain import pretrain, table
        from sophia.lab.protocols import recipe
        from sophia.lab.support.errors import UsageError

        if self.forecast:
            names = self.recipes or tuple(recipe.recipes())
            shown = table(names, devices=self.devices, layout=self.layout, recompute=self.recompute)
            Console(width=170).print(shown)
            return 0
        if len(self.recipes) != 1 or self.tokens is None:
            raise UsageError(
                f"sophia pretrain was given {len(self.recipes)} recipes and "
                f"{'no ' if self.tokens is None else ''}tokens, and it trains one on one folder. Write: "
                "sophia pretrain gpt2-125m --tokens FOLDER, or sophia pretrain --forecast"
            )
        pretrain(
            recipe.find(self.recipes[0]),
            contender=self.contender,
            folder=self.tokens,
            seed=self.seed,
            steps=self.steps,
            micro_batches=self.micro_batches,
            layout=self.layout,
            recompute=self.recompute,
            out=self.out,
            device=self.device,
            trackers=self.tracker,
            save_every=self.save_every,
            console=Console(),
        )
        return 0
