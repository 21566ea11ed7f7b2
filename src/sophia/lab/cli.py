"""The command `sophia`: from a command line to a subcommand. What options mean is checked where used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sophia.lab.commands.base import Command

__all__ = ["main"]

NEEDED = (
    *("tyro", "rich", "numpy", "scipy", "pydantic", "tomli_w"),
    *("tokenizers", "transformers", "matplotlib", "jinja2"),
)
"""What the extra [lab] brings; the corpus has a substitute and is asked for where it is read."""


def commands() -> dict[str, type[Command]]:
    """Every subcommand by name, in the order of the help."""
    from sophia.lab.commands.audit import Audit
    from sophia.lab.commands.bench import Bench
    from sophia.lab.commands.claims import Claims
    from sophia.lab.commands.compare import Compare
    from sophia.lab.commands.contenders import Contenders
    from sophia.lab.commands.doctor import Doctor
    from sophia.lab.commands.evaluate import Evaluate
    from sophia.lab.commands.experiment import Experiment
    from sophia.lab.commands.pack import Pack
    from sophia.lab.commands.pretrain import Pretrain
    from sophia.lab.commands.price import Price
    from sophia.lab.commands.report import Report
    from sophia.lab.commands.sweep import Sweep
    from sophia.lab.commands.train import Train

    return {
        "compare": Compare,
        "sweep": Sweep,
        "train": Train,
        "report": Report,
        "pack": Pack,
        "contenders": Contenders,
        "audit": Audit,
        "bench": Bench,
        "experiment": Experiment,
        "claims": Claims,
        "pretrain": Pretrain,
        "evaluate": Evaluate,
        "doctor": Doctor,
        "price": Price,
    }


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command; exits with 0, 1 (failure), 2 (wrong use) or 128 + signal."""
    try:
        _main(arguments)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # who reads has gone, as in `sophia compare --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise


def _main(arguments: list[str] | None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["--version"], ["-V"]):
        print(f"torch-sophia {importlib.metadata.version('torch-sophia')}")
        return
    if arguments[:1] == ["doctor"]:  # it is there for environments in which the lab cannot run
        from sophia.doctor.command import main as doctor

        raise SystemExit(doctor(arguments[1:]))
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(
            f"The lab needs the package {missing[0]!r}, which is not installed. "
            "Write: pip install 'torch-sophia[lab]'",
            file=sys.stderr,
        )
        raise SystemExit(1)
    from sophia.lab.support.errors import LabError

    if arguments[:1] == ["plan"]:
        print("sophia plan is now sophia price; the old word goes with the next release.", file=sys.stderr)
        arguments = ["price", *arguments[1:]]
    chosen = parse(arguments or ["--help"])
    # What is printed after a stop, to be pasted as it is.
    command = shlex.join(["sophia", *(a for a in arguments if a != "--resume")])
    try:
        code = chosen.run(command)
    except LabError as error:
        print(f"sophia: {error}", file=sys.stderr)
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:  # before the first step, when there is nothing to save
        raise SystemExit(130) from None
    if code:
        raise SystemExit(code)


def parse(arguments: list[str]) -> Command:
    """The subcommand of a command line; wrong options end the process with a message and code 2."""
    import tyro  # after the check of what is installed

    chosen: Command = tyro.extras.subcommand_cli_from_dict(
        commands(),
        prog="sophia",
        description="A lab for optimizers of language-model pre-training, Sophia among them.",
        args=arguments,
        # --resume without a --no-resume; --lr and --set as often as one likes.
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction),
    )
    return chosen


if __name__ == "__main__":
    main()
