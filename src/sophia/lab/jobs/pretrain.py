"""`sophia pretrain`: a recipe on a folder of token files, alone or under ``torchrun``; or what it would
take.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sophia.lab.config.field_types import Device
from sophia.lab.config.record_format import EndRow
from sophia.lab.config.run import Data, Run
from sophia.lab.data import token_files
from sophia.lab.forecast.pretraining import Pacer, needs
from sophia.lab.jobs import reuse
from sophia.lab.models.size import forecast, parameters
from sophia.lab.protocols import recipe as recipe_files
from sophia.lab.protocols.recipe import Recipe
from sophia.lab.support.errors import Stopped
from sophia.lab.support.signals import requests
from sophia.lab.training.loop import Progress, train
from sophia.lab.training.processes import assemble
from sophia.lab.training.run_folder import Record
from sophia.lab.training.trackers import Trackers

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["pretrain", "table"]


def pretrain(
    recipe: Recipe,
    *,
    contender: str,
    folder: Path,
    seed: int,
    steps: int | None,
    micro_batches: int,
    layout: str,
    recompute: bool,
    out: Path,
    device: Device,
    save_every: int,
    trackers: Sequence[str] = (),
    console: Console,
) -> EndRow:
    """Train, or go on; the first process says how it goes. Every process of a run calls it."""
    tracked = Trackers(tuple(trackers), group=out.name, folder=out)
    tracked.check()
    tokens, data = token_files.read(
        folder, name=recipe.tokens, vocabulary=recipe.vocabulary, size=recipe.model.vocabulary
    )
    run = recipe.run(contender, data=data, seed=seed, steps=steps, micro_batches=micro_batches, device=device)
    team = assemble(layout, device=device)
    try:
        if team.rank == 0:
            console.print(
                f"{recipe.about}: {contender}, {run.steps} steps of {run.batch} x {run.model.context} tokens "
                f"on {team.size} {'process' if team.size == 1 else 'processes'}. "
                f"Records: {Record(out, run).folder}",
                highlight=False,
                soft_wrap=True,
            )
            for note in reuse.check([run], out) if team.size == 1 else ():
                console.print(note, highlight=False, markup=False, style="yellow")
            for line in tracked.words():
                console.print(line, highlight=False, soft_wrap=True)
            if Record(out, run).result() is None:
                said = needs(
                    run,
                    out,
                    devices=team.size,
                    sharded=layout == "fsdp2",
                    recompute=recompute,
                    save_every=save_every,
                )
                console.print(said, highlight=False, soft_wrap=True)
        pacer = Pacer(run)

        def report(progress: Progress) -> None:
            if team.rank == 0:
                share = "" if progress.unclipped is None else f", {progress.unclipped:.1%} unclipped"
                console.print(f"step {progress.step}: loss {progress.loss:.4f}{share}", highlight=False)
                if (said := pacer.row(progress.step)) is not None:
                    console.print(said, highlight=False, soft_wrap=True)

        with requests() as stop:
            try:
                result = train(
                    run,
                    out,
                    tokens,
                    save_every=save_every,
                    stop=stop,
                    report=report,
                    team=team,
                    recompute=recompute,
                    keep=True,
                    trackers=tracked,
                )
            except Stopped as stopped:
                raise Stopped(f"{stopped}\nTo go on: the same command", signal=stopped.signal) from None
        if team.rank == 0:
            loss = result["loss"]
            end = "diverged" if loss is None else f"held-out loss {loss:.4f} nats a token"
            console.print(f"{contender} after {result['steps']} steps: {end}.", highlight=False)
        return result
    finally:
        team.close()


def table(names: Sequence[str], *, devices: int, layout: str, recompute: bool) -> Table:
    """Parameters, FLOPs and memory of every contender of the recipes; AdamW first of each."""
    from rich.table import Table

    made = Table(
        title=f"One step, and a whole run, on {devices} {'device' if devices == 1 else 'devices'}, "
        f"{layout if devices > 1 else 'one copy'}; a micro-batch of one sequence",
        title_justify="left",
    )
    for title in (
        "recipe",
        "contender",
        "parameters",
        "tokens",
        "TFLOPs a step",
        "to AdamW",
        "FLOPs",
        "weights and state, GB",
        "in a refresh, GB",
        "activations, GB",
        "peak, GB",
    ):
        made.add_column(title, justify="left" if title in ("recipe", "contender") else "right")
    for name in names:
        recipe = recipe_files.find(name)
        count = parameters(recipe.model)
        found = {
            contender: forecast(
                _planned(recipe, contender, devices),
                devices=devices,
                sharded=layout == "fsdp2",
                recompute=recompute,
                count=count,
            )
            for contender in recipe.contenders
        }
        for contender, own in found.items():
            first = contender == next(iter(found))
            made.add_row(
                recipe.name if first else "",
                contender,
                f"{count / 1e6:,.0f}M" if first else "",
                f"{own.tokens / 1e9:,.0f}B" if first else "",
                f"{own.flops_per_step / 1e12:,.0f}",
                f"{own.flops_per_step / found['adamw'].flops_per_step:.3f}",
                f"{own.flops:.2e}",
                *(f"{b / 1e9:.1f}" for b in (own.weights, own.refresh, own.activations, own.peak)),
                end_section=contender == list(found)[-1],
            )
    return made


def _planned(recipe: Recipe, contender: str, devices: int) -> Run:
    """The run with micro-batches of one sequence, as many as that takes."""
    nowhere = Data(recipe.tokens, "", recipe.vocabulary)
    parts = max(1, recipe.batch // devices)
    return recipe.run(contender, data=nowhere, seed=0, micro_batches=parts)
