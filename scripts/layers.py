"""The layers of the package, low to high, and what imports what, read from the sources.

``tests/test_layers.py`` holds the sources to this list, ``draw_imports.py`` draws it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "sophia"

# Low to high. A unit (a file, or a folder with all that is in it) may import from lower lines and from
# itself; never from its own line. The words are those of the picture; a unit without them is not drawn.
LAYERS = [
    # the library: mathematics, words for errors, who holds what
    {
        "sophia.reference": "the paper: read first",
        "sophia.update_rule": "the step's equations",
        "sophia.checks": "of what users pass",
        "sophia.distributed": "process groups, shards",
        "sophia.likelihoods": "what outputs mean",
        "sophia.diagnostics": "stats and advice",
    },
    # what h is; what a step does; the versions of both
    {
        "sophia.step": "groups, state, kernels",
        "sophia.curvature": "estimators of the diagonal",
        "sophia.numerics": "versions of the numbers",
    },
    # when and from what h is refreshed; files of other Sophias
    {
        "sophia.checkpoints": "state of other Sophias",
        "sophia.refresh": "when h is renewed, and from what",
    },
    {"sophia.optimizer": "class Sophia"},
    {"sophia": "the public names"},
    {
        "sophia.integrations": "other packages' hooks",
        "sophia.doctor": "checks of an installation or a model",
    },
    # the lab: tools, then plain data
    {"sophia.lab.support": "errors, files, signals, units"},
    {"sophia.lab.config": "what is to be run, as frozen data"},
    {"sophia.lab.records": "what runs leave, read"},
    # text; contenders; what records establish
    {
        "sophia.lab.data": "text to batches",
        "sophia.lab.optimizers": "the contenders",
        "sophia.lab.analysis": "what records establish",
    },
    {
        "sophia.lab.models": "models and their size",
        "sophia.lab.report": "page and pictures",
    },
    {
        "sophia.lab.protocols": "a comparison, fixed beforehand",
        "sophia.lab.bench": "cost of a step",
    },
    {
        "sophia.lab.training": "one run, or several at a time",
        "sophia.lab.price": "hours and money",
    },
    {"sophia.lab.forecast": "time, memory, disk"},
    {"sophia.lab.jobs": "what a subcommand does"},
    {"sophia.lab.experiments": "one claim of the paper each"},
    {"sophia.lab.commands": "options of each subcommand"},
    {"sophia.lab.cli": "the command sophia", "sophia.lab": ""},
    {"sophia.__main__": ""},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Beyond the order: the two halves of Sophia meet in the optimizer alone.
APART = [("sophia.refresh", "sophia.step")]


def files() -> list[Path]:
    """All Python files of the package."""
    return sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The entry of the list that a module belongs to: a file, or a package with all that is in it."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["lab"] else 2])


@cache
def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package, and not something inside one."""
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(module: str, source: str, *, package: bool = False) -> Iterator[str]:
    """All modules that a source imports, at any depth (inside functions too).

    ``package``: whether the source is that of an ``__init__.py``, from which dots count otherwise.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + package]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if base.split(".")[0] == "sophia" and is_module(inner) else base


def units_imported(module: str, source: str, *, package: bool = False) -> set[str]:
    """The other units of the package that a source imports from."""
    found = {unit(n) for n in imports(module, source, package=package) if n.split(".")[0] == "sophia"}
    return found - {unit(module)}


def arrows() -> dict[str, set[str]]:
    """For every unit those that it imports from."""
    found: dict[str, set[str]] = {name: set() for names in LAYERS for name in names}
    for path in files():
        name = module_name(path)
        found[unit(name)] |= units_imported(name, path.read_text(), package=path.name == "__init__.py")
    return found
