"""The tests under every version of torch and Python that is promised, a session each.

    pip install -e '.[matrix]'
    nox -s 'tests-3.11(torch-2.6)'                      # the floor of pyproject.toml
    nox -s 'tests-3.13(torch-2.14)' -- tests/refresh    # arguments for pytest come after the dashes
    nox --list

The packages are those of ``constraints/dev.txt``, but for torch and what torch itself pins. Where pip knows
no CPU build of a torch it takes the CUDA build, 3 to 6 GB in each environment.
"""

from pathlib import Path

import nox

nox.options.sessions = []  # nine environments of gigabytes: none without its name
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

PYTHONS = ("3.11", "3.12", "3.13")
TORCHES = {"torch-2.6": "2.6.0", "torch-2.13": "2.13.0", "torch-2.14": "2.14.1"}
OF_TORCH = ("torch", "sympy")  # torch 2.6 wants one sympy, and no other


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [nox.param(version, id=name) for name, version in TORCHES.items()])
def tests(session: nox.Session, torch: str) -> None:
    """The whole suite, or what is named after two dashes."""
    lines = Path("constraints/dev.txt").read_text(encoding="utf-8").splitlines()
    pins = Path(session.create_tmp()) / "constraints.txt"
    kept = [line for line in lines if line.partition("==")[0] not in OF_TORCH]
    pins.write_text("\n".join([*kept, f"torch=={torch}", ""]), encoding="utf-8")
    session.install("-c", str(pins), "-e", ".[lab,dev]")
    session.run("python", "-c", "import sys, torch; print(sys.version, torch.__version__)")
    session.run("pytest", *session.posargs)
