"""The command `sophia`: from a command line to a call. What options mean is checked where used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sophia.lab.options import Compare, Train

__all__ = ["main"]

NEEDED = ("tyro", "rich", "numpy", "scipy", "tokenizers", "transformers", "matplotlib", "jinja2")
"""What the extra [lab] brings; the corpus has a substitute and is asked for where it is read."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command; exits with 0, 1 (failure), 2 (wrong use) or 128 + signal."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["--version"], ["-V"]):
        print(f"torch-sophia {importlib.metadata.version('torch-sophia')}")
        return
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"The lab needs the package {missing[0]!r}, which is not installed. "
            "Write: pip install 'torch-sophia[lab]'",
            file=sys.stderr,
        )
        raise SystemExit(1)
    from sophia.lab import options as typed  # after the check, since it needs the extra
    from sophia.lab.errors import LabError

    options = typed.parse(arguments or ["--help"])
    # What is printed after a stop, to be pasted as it is.
    command = shlex.join(["sophia", *(a for a in arguments if a != "--resume")])
    try:
        if isinstance(options, typed.Compare):
            _compare(options, command)
        else:
            _train(options, command)
    except LabError as error:
        print(f"sophia: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:  # before the first step, when there is nothing to save
        raise SystemExit(130) from None


def _compare(options: Compare, command: str) -> None:
    from rich.console import Console

    from sophia.lab.compare import compare
    from sophia.lab.plan import parse_settings

    compare(
        options.contenders,
        preset=options.preset,
        seeds=options.seeds,
        data=options.data,
        over=parse_settings(options.lr, options.set),
        budgets=options.budgets,
        out=options.out,
        resume=options.resume,
        workers=options.workers,
        device=options.device,
        command=command,
        console=Console(),
    )


def _train(options: Train, command: str) -> None:
    from rich.console import Console

    from sophia.lab.plan import parse_settings
    from sophia.lab.single import train_one

    lr = [] if options.lr is None else [f"{options.contender}={options.lr}"]
    over = parse_settings(lr, [f"{options.contender}.{pair}" for pair in options.set])
    train_one(
        options.contender,
        preset=options.preset,
        seed=options.seed,
        steps=options.steps,
        data=options.data,
        over=over.get(options.contender, {}),
        out=options.out,
        resume=options.resume,
        device=options.device,
        command=command,
        console=Console(),
    )


if __name__ == "__main__":
    main()
