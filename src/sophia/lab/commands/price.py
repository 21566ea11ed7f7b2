"""`sophia plan`: its options and its tables; the calculation is in ``sophia.lab.price``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from sophia.lab.price.options import Asked

if TYPE_CHECKING:
    from rich.table import Table

    from sophia.lab.price.inputs import Gain, Inputs

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan(Asked):
    """Price a pre-training run in hours and dollars, with AdamW and with Sophia at a given speed-up.

    Nothing is run. Every input is shown with its source, and can be given. Without a size it prices the
    example paper-770m.
    """

    size: Positional[str | None] = None
    """A recipe (gpt2-125m, gpt2-355m, gpt2-540m, gpt2-770m, neox-1.5b, neox-6.6b, or 125M to 6.6B for short;
    or a TOML file), or a number of parameters such as 13B.
    """
    speedup_from: Path | None = None
    """Folder of a comparison, whose measured speed-up is priced as well."""
    example: str | None = None
    """Packaged inputs: paper-355m, paper-770m or two-million; other options go over them."""
    json: Path | None = None
    """File for inputs and results as JSON."""

    def run(self, command: str) -> int:
        """Calculate, and print inputs, bill and what they say."""
        from rich.console import Console

        from sophia.lab.price.bill import bill, break_even, sentence
        from sophia.lab.price.find_inputs import find_example, inputs_of
        from sophia.lab.price.measured_speedup import measured_gain
        from sophia.lab.support.files import write_json

        name = "paper-770m" if self.size is None and self.example is None else self.example
        example = None if name is None else find_example(name)
        measured: tuple[Gain, ...] = ()
        if self.speedup_from is not None:
            measured = (measured_gain(self.speedup_from, self.contender or "sophia-g"),)
        asked = Asked(**{field.name: getattr(self, field.name) for field in fields(Asked)})
        inputs = inputs_of(asked, example, measured=measured)
        console = Console()
        console.print(_inputs(inputs))
        console.print(_bill(inputs))
        sentences = [sentence(inputs, gain) for gain in inputs.gains]
        sentences += [
            f"{gain.contender} pays above a speed-up of {break_even(gain):.3f} in steps."
            for gain in inputs.gains[:1]
        ]
        for text in sentences:
            console.print(text, highlight=False)
        if self.json is not None:
            plain = {"inputs": asdict(inputs), "columns": [asdict(c) for c in bill(inputs)]}
            write_json(self.json, {**plain, "sentences": sentences})
        return 0


def _inputs(inputs: Inputs) -> Table:
    from rich.table import Table

    from sophia.lab.price.bill import plain, words
    from sophia.lab.support.units import count, dollars, size

    table = Table(title=f"Inputs: {inputs.about}", title_justify="left")
    for title in ("input", "value", "source"):
        table.add_column(title, justify="right" if title == "value" else "left")
    rows: list[tuple[str, Any, Any]] = [
        ("parameters", inputs.parameters, count),
        ("FLOPs a token", inputs.flops_per_token, lambda v: f"{v:.3e}"),
        ("tokens", inputs.tokens, count),
        ("tokens a step", inputs.tokens_per_step, count),
        ("peak of a device, FLOP/s", inputs.peak, lambda v: f"{v:.3g}"),
        ("utilisation", inputs.utilisation, lambda v: f"{v:.1%}"),
        ("devices", inputs.devices, lambda v: f"{v:g}"),
        ("price of a device and hour", inputs.price, dollars),
        ("a step of AdamW, seconds", inputs.step_seconds, lambda v: f"{v:g}"),
        ("activations", inputs.activations, size),
    ]
    for what, known, form in rows:
        if known is not None:
            table.add_row(what, form(known.value), known.source)
    for gain in inputs.gains:
        table.add_section()
        table.add_row(f"{gain.name}: speed-up in steps", words(gain.speedup, plain), gain.source)
        table.add_row("  FLOPs of a step, more", f"{gain.more_flops.value:.1%}", gain.more_flops.source)
        table.add_row("  time of a step, more", f"{gain.more_time.value:.1%}", gain.more_time.source)
        table.add_row("  state, bytes a parameter", f"{gain.state.value:g}", gain.state.source)
    return table


def _bill(inputs: Inputs) -> Table:
    from rich.table import Table

    from sophia.lab.price.bill import bill, words
    from sophia.lab.support.units import count, dollars, duration, size

    columns = bill(inputs)
    table = Table(title="The bill", title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column.name, justify="right")
    forms: list[tuple[str, str, Any]] = [
        ("steps", "steps", lambda v: f"{v:,.0f}"),
        ("tokens", "tokens", count),
        ("FLOPs", "flops", lambda v: f"{v:.2e}"),
        ("time", "hours", lambda v: duration(3600 * v)),
        ("device-hours", "device_hours", lambda v: f"{v:,.0f}"),
        ("dollars", "dollars", dollars),
    ]
    for what, name, form in forms:
        table.add_row(what, *(words(getattr(column, name), form) for column in columns))
    table.add_row("weights, gradients, state", *(size(column.held) for column in columns))
    table.add_row(
        "more in a refresh", *(size(column.refresh) if column.refresh else "" for column in columns)
    )
    return table
