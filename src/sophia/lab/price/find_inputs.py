"""From what was asked for to the inputs of a price: options first, then an example, a recipe, assumptions."""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sophia.lab.config.run import Data
from sophia.lab.models.size import flops_per_token, forecast
from sophia.lab.models.size import parameters as parameters_of
from sophia.lab.optimizers import table
from sophia.lab.price.inputs import HARDWARE, Gain, Inputs, Known, Number, Span
from sophia.lab.price.options import Asked
from sophia.lab.protocols import recipe
from sophia.lab.protocols.recipe import Recipe
from sophia.lab.support.dataclass_json import from_json
from sophia.lab.support.errors import UsageError
from sophia.lab.support.units import amount

__all__ = ["Example", "examples", "find_example", "inputs_of"]

GIVEN = "given"


@dataclass(frozen=True)
class Example:
    """A packaged plan: values with their sources."""

    name: str
    about: str
    values: Asked
    sources: Mapping[str, str]
    """By the name of a value."""


def examples() -> dict[str, Path]:
    """The packaged examples: name and file."""
    folder = Path(str(importlib.resources.files("sophia.lab.price") / "examples"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_example(name: str) -> Example:
    """An example by its name. Raises ``UsageError`` that lists them."""
    known = examples()
    if name not in known:
        raise UsageError(f"There is no example {name!r}. Choose from: {', '.join(known)}.")
    found: dict[str, Any] = tomllib.loads(known[name].read_text(encoding="utf-8"))
    example = from_json(Example, found)
    values = {f.name for f in fields(Asked) if getattr(example.values, f.name) is not None}
    if values != set(example.sources):
        raise UsageError(f"{known[name]}: every value needs a source, and the other way round.")
    return example


@dataclass(frozen=True)
class _Finder:
    """Looks a value up, with its source."""

    asked: Asked
    example: Example | None
    recipe: Recipe | None = None

    def get(self, name: str) -> tuple[Any, str] | None:
        """The value as given, or the example's."""
        if (value := getattr(self.asked, name)) is not None:
            return value, GIVEN
        if self.example is not None and (value := getattr(self.example.values, name)) is not None:
            return value, self.example.sources[name]
        return None

    def number(self, name: str, default: Known) -> Known:
        """As a number above zero."""
        found = self.get(name)
        if found is None:
            return default
        value, source = found
        number = amount(value) if isinstance(value, str) else float(value)
        if number is None or not 0 < number < float("inf"):
            raise UsageError(
                f"--{name.replace('_', '-')} is {value!r}, and a price needs a number above 0. "
                "Write for instance 2.5, 3e12 or 300B."
            )
        return Known(number, source)

    def with_recipe(self) -> _Finder:
        """With the recipe that the size names, if it names one."""
        found = self.get("size")
        if found is None:
            raise UsageError(
                "There is no size to price. Write for instance: sophia plan 770M, or sophia plan "
                f"--example {next(iter(examples()))}"
            )
        text = str(found[0])
        short = {name.rpartition("-")[2]: name for name in recipe.recipes()}
        name = short.get(text.lower(), text)
        if name in recipe.recipes() or name.endswith(".toml"):
            return replace(self, recipe=recipe.find(name))
        if amount(text) is None:
            raise UsageError(
                f"{text!r} is no size. Write a number of parameters such as 13B, or a recipe: "
                f"{', '.join(recipe.recipes())}."
            )
        return self


def inputs_of(asked: Asked, example: Example | None = None, *, measured: tuple[Gain, ...] = ()) -> Inputs:
    """All inputs; ``measured`` are gains from comparisons.

    Raises ``UsageError`` for values that cannot be.
    """
    find = _Finder(asked, example).with_recipe()
    own = find.recipe
    size = find.get("size")
    assert size is not None, "with_recipe raises without a size"
    if own is not None:
        source = f"recipe {own.name}"
        parameters = Known(parameters_of(own.model), f"{source}, counted")
        flops = Known(flops_per_token(own.model, int(parameters.value)), "6 N + 12 L C d")
        steps, batch, context = (Known(v, source) for v in (own.steps, own.batch, own.model.context))
    else:
        parameters = Known(amount(str(size[0])) or 0.0, size[1])
        flops = Known(6 * parameters.value, "6 N; attention left out, its shape is not known")
        # Twenty tokens a parameter is the rule of Hoffmann et al. (arXiv 2203.15556).
        batch, context = Known(512, "assumed"), Known(2048, "assumed")
        steps = Known(max(1.0, 20 * parameters.value // (512 * 2048)), "20 tokens a parameter")
    batch, context = find.number("batch", batch), find.number("context", context)
    per_step = Known(batch.value * context.value, _joined(batch, context))
    steps = find.number("steps", steps)
    tokens = find.number("tokens", Known(steps.value * per_step.value, _joined(steps, per_step)))
    devices = find.number("devices", Known(1, "assumed"))
    peak, seconds = _peak(find), _seconds(find)
    if seconds is None:
        utilisation = find.number("utilisation", Known(0.4, "assumed"))
    else:
        reached = flops.value * per_step.value / (seconds.value * peak.value * devices.value)
        utilisation = Known(reached, "from the seconds of a step")
    if utilisation.value > 1:
        raise UsageError(
            f"The utilisation is {utilisation.value:.2f} ({utilisation.source}), and no device does more "
            "than its peak. Give a number up to 1, or more devices."
        )
    return Inputs(
        about=example.about if example is not None else f"{size[0]} parameters" if own is None else own.about,
        parameters=parameters,
        flops_per_token=flops,
        tokens=tokens,
        tokens_per_step=per_step,
        peak=peak,
        utilisation=utilisation,
        devices=devices,
        price=find.number("price", Known(2.0, "assumed")),
        step_seconds=seconds,
        activations=None if own is None else _activations(own),
        gains=_gains(find, measured),
    )


def _peak(find: _Finder) -> Known:
    """Given as a number, or by the name of the hardware."""
    if find.asked.peak is not None and find.asked.hardware is not None:
        raise UsageError(
            f"--peak {find.asked.peak:g} and --hardware {find.asked.hardware} are two peaks. "
            "Give one of them."
        )
    named = find.get("hardware") or ("a100", "assumed")
    if find.asked.hardware is None and find.get("peak") is not None:
        return find.number("peak", Known(0.0, ""))
    if named[0] not in HARDWARE:
        raise UsageError(
            f"--hardware is {named[0]!r}, whose peak is not in the table. Choose from: "
            f"{', '.join(HARDWARE)}; or give its FLOP/s with --peak."
        )
    return Known(HARDWARE[str(named[0])], f"{named[0]}, data sheet ({named[1]})")


def _seconds(find: _Finder) -> Known | None:
    if find.get("step_seconds") is None:
        return None
    found = find.number("step_seconds", Known(0.0, ""))
    if found.source == GIVEN:
        if find.asked.utilisation is not None:
            raise UsageError(
                "--step-seconds and --utilisation both say how fast a step is. Give one of them."
            )
        return found
    # Seconds of an example are of its own machine, model and batch.
    machine = ("hardware", "peak", "devices", "utilisation", "batch", "context", "size")
    return None if any(getattr(find.asked, name) is not None for name in machine) else found


def _gains(find: _Finder, measured: tuple[Gain, ...]) -> tuple[Gain, ...]:
    """What was claimed or supposed, and what was measured."""
    time = _more_time(find)
    if time is not None and time.source == GIVEN:
        measured = tuple(replace(gain, more_time=time) for gain in measured)
    if find.get("speedup") is None and measured:
        return measured
    name = find.asked.contender or "sophia-g"
    speedup = find.number("speedup", Known(1.0, "none given: equal steps"))
    if speedup.source != GIVEN and not name.startswith("sophia"):
        if not measured:
            raise UsageError(
                f"The speed-up ({speedup.source}) is not one of {name}. Give its own with --speedup or "
                "--speedup-from."
            )
        name = "sophia-g"  # --contender names the one that was measured
    span = Span(Number(speedup.value))
    if (interval := find.asked.interval) is not None:
        low, high = interval
        if not 0 < low <= speedup.value <= high < float("inf"):
            raise UsageError(
                f"--interval is {low} {high}, and the speed-up {speedup.value} does not lie in it. "
                "Write low and high of the speed-up, for instance --interval 1.6 2.4."
            )
        span = Span(Number(speedup.value), Number(low), Number(high))
    row, flops = table.find(name), _more_flops(find, name)
    state = Known(row.state_per_parameter, "table of contenders")
    return (Gain(name, span, speedup.source, flops, time or flops, state), *measured)


def _more_time(find: _Finder) -> Known | None:
    """As given; or an example's, if the optimizer is still the one that it was measured with."""
    found = find.get("overhead")
    other = any(getattr(find.asked, name) is not None for name in ("contender", "update_every", "fraction"))
    if found is None or (found[1] != GIVEN and other):
        return None
    if not 0 <= found[0] < float("inf"):
        raise UsageError(f"--overhead is {found[0]}: a share of AdamW's time. Write 0.05 for 5%.")
    return Known(float(found[0]), found[1])


def _more_flops(find: _Finder, name: str) -> Known:
    """By the contender's own count of gradients, with the settings that were given."""
    row = table.find(name)
    settings, source = dict(row.defaults), "defaults"
    if find.recipe is not None and name in find.recipe.contenders:
        settings, source = settings | dict(find.recipe.contenders[name]), f"recipe {find.recipe.name}"
    for key in ("update_every", "fraction"):
        if (found := find.get(key)) is not None:
            if key not in settings:
                raise UsageError(f"{name} has no {key}, so it would have no effect. Leave it out.")
            settings[key] = type(settings[key])(find.number(key, Known(0.0, "")).value)
            source = found[1]
    parts = [f"{key} {settings[key]:g}" for key in ("update_every", "fraction") if key in settings]
    return Known(row.gradients(settings), f"{', '.join(parts)} ({source})" if parts else "no extra gradients")


def _activations(own: Recipe) -> Known:
    nowhere = Data(own.tokens, "", own.vocabulary)
    run = own.run("adamw", data=nowhere, seed=0, micro_batches=own.batch)
    return Known(forecast(run, count=1).activations, "a sequence, fused attention, as estimated")


def _joined(*known: Known) -> str:
    return ", ".join(dict.fromkeys(each.source for each in known))
