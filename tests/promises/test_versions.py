"""The versions of Python and torch that are promised, in the four places that name them."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def of_nox():
    """What noxfile.py runs, without nox."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return ast.literal_eval(values["PYTHONS"]), ast.literal_eval(values["TORCHES"])


def test_the_lowest_versions_are_those_that_are_run():
    """A floor that nobody runs is a guess: a name that a later torch has is used in an afternoon."""
    pythons, torches = of_nox()
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    (floor,) = [d for d in PROJECT["dependencies"] if d.startswith("torch")]
    assert floor == f"torch>={next(iter(torches.values())).removesuffix('.0')}"
    for name, version in torches.items():
        assert name == "torch-" + ".".join(version.split(".")[:2])


def test_the_pinned_torch_is_among_them():
    """Else the environment of every day is none of those that are promised."""
    pins = (ROOT / "constraints" / "dev.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==(.*)$", pins, re.M)[1] in of_nox()[1].values()


def test_the_readme_names_what_is_run():
    """Who asks whether it runs with theirs looks there."""
    (line,) = [x for x in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if "Tested with" in x]
    pythons, torches = of_nox()
    assert set(re.findall(r"\d+\.\d+(?:\.\d+)?", line)) == {*pythons, *torches.values()}
    classifiers = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert classifiers == list(pythons)
