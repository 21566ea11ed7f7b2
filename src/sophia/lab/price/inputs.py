"""The inputs of a price, each with its source: options first, then an example, a recipe, assumptions."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sophia.lab.analysis.speedup import Ratio
from sophia.lab.analysis.verdict import summarise
from sophia.lab.models import size as shapes
from sophia.lab.optimizers import table
from sophia.lab.price.bill import Gain, Known
from sophia.lab.protocols import recipe
from sophia.lab.support.errors import UsageError
from sophia.lab.support.toml_files import packaged
from sophia.lab.support.units import amount

__all__ = ["HARDWARE", "examples", "find_inputs"]

HARDWARE = {"v100": 125e12, "a100": 312e12, "h100": 989e12, "h200": 989e12}
"""Peak FLOP/s of a device, dense, in bfloat16 (v100: float16), by the maker's data sheets (SXM versions)."""
_MACHINE = {"size", "batch", "context", "hardware", "peak", "utilisation", "devices"}


def examples() -> dict[str, Path]:
    """The packaged examples: name and file. In it each value has its source as a comment."""
    return packaged("sophia.lab.price", "examples")


def find_inputs(options: Mapping[str, Any], example: str | None = None) -> tuple[dict[str, Known], Gain]:
    """All inputs by name, and the contender's gain. Options that are None are found elsewhere.

    Raises ``UsageError`` for values that cannot be.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if example is not None and example not in examples():
        raise UsageError(f"There is no example {example!r}. Choose from: {', '.join(examples())}.")
    packaged = {} if example is None else tomllib.loads(examples()[example].read_text("utf-8"))
    packaged.pop("about", None)
    if _MACHINE & set(given):
        packaged.pop("step_seconds", None)  # of its own machine, model and batch
    if "contender" in given:
        packaged.pop("overhead", None)  # of its own optimizer
    for one, other in (("peak", "hardware"), ("step_seconds", "utilisation"), ("speedup", "speedup_from")):
        if {one, other} <= set(given):
            raise UsageError(f"{_option(one)} and {_option(other)} say one thing twice. Give one of them.")
        if other in given:
            packaged.pop(one, None)
    found = {name: Known(value, f"example {example}") for name, value in packaged.items()}
    found |= {name: Known(value, "given") for name, value in given.items()}
    own = _recipe(found)
    return _values(found, own), _gain(found, own)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(found: Mapping[str, Known], name: str, *default: float | str) -> Known:
    """What was found, or the default and its source, as a number above zero."""
    value, source = found.get(name) or Known(*default)  # type: ignore[arg-type]
    number = amount(value) if isinstance(value, str) else float(value)
    if number is None or not 0 < number < float("inf"):
        raise UsageError(
            f"{_option(name)} is {value!r}, and a price needs a number above 0. "
            "Write for instance 2.5, 3e12 or 300B."
        )
    return Known(number, source)


def _recipe(found: Mapping[str, Known]) -> recipe.Recipe | None:
    """The recipe that the size names, if it names one."""
    if "size" not in found:
        raise UsageError("There is no size to price. Write for instance: sophia price 770M")
    text = str(found["size"].value)
    name = {name.rpartition("-")[2]: name for name in recipe.recipes()}.get(text.lower(), text)
    if name in recipe.recipes() or name.endswith(".toml"):
        return recipe.find(name)
    if amount(text) is None:
        raise UsageError(
            f"{text!r} is no size. Write a number of parameters such as 13B, or a recipe: "
            f"{', '.join(recipe.recipes())}."
        )
    return None


def _values(found: Mapping[str, Known], own: recipe.Recipe | None) -> dict[str, Known]:
    if own is None:
        size = _number(found, "size")
        flops = Known(6 * size.value, "6 N; attention left out, its shape is not known")
        batch, context = _number(found, "batch", 512, "assumed"), _number(found, "context", 2048, "assumed")
        # Twenty tokens a parameter is the rule of Hoffmann et al. (arXiv 2203.15556).
        run, source = 20 * size.value, "20 tokens a parameter"
    else:
        recipe_name = f"recipe {own.name}"
        size = Known(shapes.parameters(own.model), f"{recipe_name}, counted")
        flops = Known(shapes.flops_per_token(own.model, int(size.value)), "6 N + 12 L C d")
        batch = _number(found, "batch", own.batch, recipe_name)
        context = _number(found, "context", own.model.context, recipe_name)
        run, source = own.steps * batch.value * context.value, f"{recipe_name}: {own.steps} steps"
    if "steps" in found:
        steps = _number(found, "steps")
        run, source = steps.value * batch.value * context.value, f"{steps.value:g} steps, {steps.source}"
    values = {
        "parameters": size,
        "flops_per_token": flops,
        "tokens": _number(found, "tokens", run, source),
        "batch": batch,
        "context": context,
        "devices": _number(found, "devices", 1, "assumed"),
        "price": _number(found, "price", 2.0, "assumed"),
        "peak": _peak(found),
    }
    if "step_seconds" in found:
        seconds = values["step_seconds"] = _number(found, "step_seconds")
        per_second = flops.value * batch.value * context.value / seconds.value
        reached = per_second / values["peak"].value / values["devices"].value
        used = Known(reached, "from the seconds of a step")
    else:
        used = _number(found, "utilisation", 0.4, "assumed")
    if used.value > 1:
        raise UsageError(
            f"The utilisation is {used.value:.2f} ({used.source}), and no device does more than its peak. "
            "Give a number up to 1, or more devices."
        )
    return values | {"utilisation": used}


def _peak(found: Mapping[str, Known]) -> Known:
    """As a number, or by the name of the hardware."""
    if "peak" in found:
        return _number(found, "peak")
    name, source = found.get("hardware", ("a100", "assumed"))
    if name not in HARDWARE:
        raise UsageError(
            f"--hardware is {name!r}, whose peak is not in the table. Choose from: "
            f"{', '.join(HARDWARE)}; or give its FLOP/s with --peak."
        )
    return Known(HARDWARE[str(name)], f"{name}, data sheet ({source})")


def _gain(found: Mapping[str, Known], own: recipe.Recipe | None) -> Gain:
    """What was measured, claimed or supposed."""
    name = str(found["contender"].value) if "contender" in found else "sophia-g"
    time = found.get("overhead")
    if time is not None and not 0 <= time.value < float("inf"):
        raise UsageError(f"--overhead is {time.value}: a share of AdamW's time. Write 0.05 for 5%.")
    if "speedup_from" in found:
        return _measured(Path(str(found["speedup_from"].value)), name, time)
    value, source = _number(found, "speedup", 1.0, "none given: equal steps")
    if source != "given" and not name.startswith("sophia"):
        raise UsageError(
            f"The speed-up ({source}) is not one of {name}. Give its own with --speedup or --speedup-from."
        )
    interval: Any = found["interval"].value if "interval" in found else None
    if interval is not None and not 0 < interval[0] <= value <= interval[1] < float("inf"):
        raise UsageError(
            f"--interval is {interval[0]} {interval[1]}, and the speed-up {value} does not lie in it. "
            "Write low and high of the speed-up, for instance --interval 1.6 2.4."
        )
    row = table.find(name)
    settings, where = dict(row.defaults), "defaults"
    if own is not None and name in own.contenders:
        settings, where = settings | dict(own.contenders[name]), f"recipe {own.name}"
    parts = [f"{key} {settings[key]:g}" for key in ("update_every", "fraction") if key in settings]
    flops = Known(row.gradients(settings), f"{', '.join(parts)} ({where})" if parts else "no extra gradients")
    low, high = interval or (None, None)
    ratio = Ratio(value, low, high, 0.0, float("inf"), extrapolated=False, curve="")
    state = Known(row.state_per_parameter, "table of contenders")
    return Gain(name, ratio, source, flops=flops, time=time or flops, state=state)


def _measured(folder: Path, contender: str, time: Known | None) -> Gain:
    """The speed-up of a comparison, and what a step costs more by the count of gradients: the seconds of a
    small model on another machine say nothing about those of a large one.
    """
    summary = summarise(folder)
    speedups = {v.contender: {s.cost: s.ratio for s in v.speedups} for v in summary.verdicts}
    if contender not in speedups:
        raise UsageError(
            f"{folder} has no contender {contender!r} beside its baseline, so there is no speed-up of it to "
            f"read. Choose with --contender from: {', '.join(speedups)}."
        )
    by = speedups[contender]
    if not {"steps", "gradient evaluations"} <= set(by):
        raise UsageError(
            f"{folder} has no speed-up of {contender} ({summary.curve_problem or 'gradients not counted'}). "
            "Finish that comparison, or give a number with --speedup."
        )
    # The two differ by the gradients of a step alone, their open ends too.
    flops = Known(by["steps"].floor / by["gradient evaluations"].floor - 1, f"gradients counted in {folder}")
    sizes = {r.contender: (r.state_bytes or 0.0, r.parameters) for r in summary.rows if r.parameters}
    state, parameters = sizes.get(contender, (0.0, None))
    return Gain(
        contender,
        by["steps"],
        f"measured: {folder}",
        flops=flops,
        time=time or flops,
        state=Known(round(state / parameters, 2) if parameters else 0.0, f"as kept in {folder}"),
        measured_at=parameters,
    )
