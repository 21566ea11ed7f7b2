"""The shape of the package: imports point down the list, the library needs torch alone, and loads nothing
else.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sophia
from draw_imports import PICTURE, picture
from layers import APART, LEVEL, SOURCE, files, imports, module_name, unit, units_imported

HOSTS = ("sophia.integrations", "sophia.lab")  # these may import frameworks


def arrows_upwards(module, source, *, package=False):
    """The imports of a module that do not point down."""
    own = unit(module)
    targets = units_imported(module, source, package=package)
    return sorted(t for t in targets if LEVEL[t] >= LEVEL[own] or (own, t) in APART)


FILES = files()


def test_the_sources_are_those_that_are_imported():
    """An installed package beside the sources: the tests would run the one and read the other."""
    assert Path(sophia.__file__).parent == SOURCE


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(SOURCE)) for p in FILES])
def test_imports_point_down(path):
    """A circle of imports, or mathematics that knows the optimizer, the optimizer that knows the lab."""
    name = module_name(path)
    assert unit(name) in LEVEL, f"{unit(name)} has no place in the list of layers: give it one"
    upwards = arrows_upwards(name, path.read_text(), package=path.name == "__init__.py")
    assert not upwards, f"{name} imports from {upwards}, which are not below it"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("sophia.update_rule", "from sophia.optimizer import Sophia", ["sophia.optimizer"]),
        ("sophia.update_rule", "from sophia import optimizer", ["sophia.optimizer"]),
        ("sophia.update_rule", "from . import optimizer", ["sophia.optimizer"]),
        ("sophia.update_rule", "import sophia.lab.config.run", ["sophia.lab.config"]),
        ("sophia.update_rule", "def f():\n    from .lab.config.run import Run", ["sophia.lab.config"]),
        ("sophia.checks", "from sophia import Sophia", ["sophia"]),
        ("sophia.checks", "from sophia.diagnostics import advice", ["sophia.diagnostics"]),
        ("sophia.refresh.refresher", "from sophia.step.groups import check_group", ["sophia.step"]),
        ("sophia.step.dispatch", "from sophia.refresh.seeds import seed_for", ["sophia.refresh"]),
        ("sophia.lab.analysis.verdict", "from sophia.lab.training import loop", ["sophia.lab.training"]),
        ("sophia.lab.report.page", "from sophia.lab.training.loop import train", ["sophia.lab.training"]),
        ("sophia.lab.optimizers.table", "from ..protocols import plan", ["sophia.lab.protocols"]),
        ("sophia.curvature.exact", "from .estimate import Estimate\nfrom ..checks import check_number", []),
        ("sophia.lab.report.page", "from sophia.lab.analysis import verdict", []),
        ("sophia.optimizer", "import torch\nfrom sophia.step.groups import check_group", []),
    ],
)
def test_the_check_itself(module, source, found):
    """A check that overlooks a form of import would hold nothing."""
    assert arrows_upwards(module, source) == found


def test_library_needs_torch_alone():
    """An import that is no dependency: users without the lab's extra could not import sophia."""
    for path in FILES:
        name = module_name(path)
        if name.startswith(HOSTS):
            continue
        roots = {found.split(".")[0] for found in imports(name, path.read_text()) if found}
        # torch's CUDA builds bring triton; it is imported at its first use there, and without it all works
        with_triton = name in ("sophia.step.kernels.fused_cuda", "sophia.step.kernels.triton_step")
        own = {"torch", "sophia", *(["triton"] if with_triton else [])}
        foreign = roots - set(sys.stdlib_module_names) - own
        assert not foreign, f"{name} imports {foreign}"


def fresh(code):
    """Run code in a new interpreter that prints JSON; return it."""
    result = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def test_importing_sophia_loads_torch_and_nothing_else():
    """A slow or fragile import: numpy's, the compiler's, a framework's start-up in every worker."""
    new = fresh(
        "import json, sys, torch; before = set(sys.modules); import sophia; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    roots = {name.split(".")[0] for name in new}
    assert "sophia" in roots
    assert roots <= {"sophia", "torch"} | set(sys.stdlib_module_names)
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.testing",
        "torch.utils.tensorboard",
        "sophia.lab",
        "sophia.reference",
    )
    assert not [name for name in new if name.startswith(heavy)]


def test_lab_loads_nothing_into_the_library():
    """``from sophia import *`` in a script reaching for an extra that is not installed."""
    code = (
        "import json, sys; sys.modules.update(dict.fromkeys(['numpy', 'scipy', 'transformers', 'tyro', "
        "'rich', 'matplotlib', 'tokenizers', 'jinja2', 'pydantic', 'tomli_w'])); "
        "import warnings; warnings.simplefilter('ignore'); "
        "from sophia import *; print(json.dumps(sorted(n for n in globals() if not n.startswith('_'))))"
    )
    assert set(fresh(code)) - {"json", "sys", "warnings"} == set(sophia.__all__) - {"__version__"}


def test_the_picture_in_contributing_shows_these_imports():
    """A picture of a house that is no longer this one."""
    assert PICTURE.read_text() == picture(), "write: python scripts/draw_imports.py"
