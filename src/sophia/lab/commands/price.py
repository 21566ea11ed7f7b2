"""`sophia price`: its options and its tables; the calculation is in ``sophia.lab.price``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

__all__ = ["Price"]


@dataclass(frozen=True)
class Price:
    """Price a pre-training run in hours and dollars, with AdamW and with Sophia at a given speed-up.

    Nothing is run. Every input is shown with its source, and can be given. Without a size it prices the
    example paper-770m. (`sophia plan` is the old name.)
    """

    size: Positional[str | None] = None
    """A recipe (gpt2-125m, gpt2-355m, gpt2-540m, gpt2-770m, neox-1.5b, neox-6.6b, or 125M to 6.6B for short;
    or a TOML file), or a number of parameters such as 13B.
    """
    example: str | None = None
    """Packaged inputs: paper-355m, paper-770m or two-million; other options go over them."""
    tokens: str | None = None
    """Tokens that AdamW reads, for instance 300B; steps x batch x context unless given."""
    steps: int | None = None
    """Steps of AdamW."""
    batch: int | None = None
    """Sequences in a step."""
    context: int | None = None
    """Tokens in a sequence."""
    hardware: str | None = None
    """v100, a100, h100 or h200, for its peak."""
    peak: float | None = None
    """FLOP/s of a device at its peak, for hardware of another kind."""
    utilisation: float | None = None
    """Fraction of the peak that training reaches."""
    devices: int | None = None
    """Devices that share the work."""
    price: float | None = None
    """Dollars for a device and hour."""
    step_seconds: float | None = None
    """Seconds of a step of AdamW on all devices, measured; goes before peak and utilisation."""
    contender: str | None = None
    """sophia-g, sophia-h, or another from the table of contenders or the comparison."""
    speedup: float | None = None
    """How many times fewer steps it needs for the same loss."""
    interval: tuple[float, float] | None = None
    """Of the speed-up: low and high."""
    speedup_from: Path | None = None
    """Folder of a comparison, for the speed-up that it measured."""
    overhead: float | None = None
    """How much more time a step of it takes, 0.05 for 5%; as much as it has more FLOPs unless given."""
    json: Path | None = None
    """File for inputs and results as JSON."""

    def run(self, command: str) -> int:
        """Calculate, and print inputs, bill and what they say."""
        from rich.console import Console
        from rich.table import Table

        from sophia.lab.price.bill import amount_words, costs, costs_of_adamw, sentence
        from sophia.lab.price.inputs import examples, find_inputs
        from sophia.lab.support.files import plain, write_json
        from sophia.lab.support.units import count, dollars, duration, size

        options = {name: value for name, value in vars(self).items() if name not in ("example", "json")}
        example = "paper-770m" if self.size is None and self.example is None else self.example
        inputs, gain = find_inputs(options, example)
        adamw = costs_of_adamw(inputs)
        contender, bytes_of = costs(adamw, gain), inputs["parameters"].value

        table = Table("input", "value", "source", title="Inputs", title_justify="left")
        rows: list[tuple[str, Any, Any]] = [
            ("parameters", "parameters", count),
            ("FLOPs a token", "flops_per_token", "{:.3e}".format),
            ("tokens", "tokens", count),
            ("sequences a step", "batch", "{:g}".format),
            ("tokens a sequence", "context", "{:g}".format),
            ("peak of a device, FLOP/s", "peak", "{:.3g}".format),
            ("utilisation", "utilisation", "{:.1%}".format),
            ("devices", "devices", "{:g}".format),
            ("price of a device and hour", "price", dollars),
            ("a step of AdamW, seconds", "step_seconds", "{:g}".format),
        ]
        for title, name, form in rows:
            if name in inputs:
                table.add_row(title, form(inputs[name].value), inputs[name].source)
        table.add_section()
        for title, known, form in (
            ("more FLOPs of a step", gain.flops, "{:.1%}".format),
            ("more time of a step", gain.time, "{:.1%}".format),
            ("state, bytes a parameter", gain.state, "{:g}".format),
        ):
            table.add_row(f"{gain.contender}: {title}", form(known.value), known.source)

        bill = Table("", "adamw", gain.contender, title="The bill", title_justify="left")
        rows = [
            ("steps", "steps", "{:,.0f}".format),
            ("tokens", "tokens", count),
            ("FLOPs", "flops", "{:.2e}".format),
            ("time", "hours", lambda hours: duration(3600 * hours)),
            ("device-hours", "device_hours", "{:,.0f}".format),
            ("dollars", "dollars", dollars),
        ]
        for title, name, form in rows:
            bill.add_row(title, form(adamw[name]), amount_words(contender[name], form))
        # Weight and gradient in float32; a refresh has one gradient more.
        more = f", and {size(4 * bytes_of)} in a refresh" if gain.flops.value else ""
        held = [size((8 + state) * bytes_of) for state in (8, gain.state.value)]
        bill.add_row("weights, gradients, state", held[0], held[1] + more)

        text = sentence(adamw, gain, inputs["parameters"].value)
        pays = f"{gain.contender} pays above a speed-up of {1 + gain.time.value:.3f} in steps."
        console = Console()
        console.print(table, bill, highlight=False)
        if example is not None:
            console.print(f"Where the values of {example} are from: {examples()[example]}", soft_wrap=True)
        console.print(f"{text}\n{pays}", highlight=False)
        if self.json is not None:
            said = {"inputs": {n: k._asdict() for n, k in inputs.items()}, "gain": asdict(gain)}
            paid = {name: [amount._asdict() for amount in cost] for name, cost in contender.items()}
            both = {"adamw": adamw, gain.contender: paid}
            write_json(self.json, plain({**said, "costs": both, "sentences": [text, pays]}))
        return 0
