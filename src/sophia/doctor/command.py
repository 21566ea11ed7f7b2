"""Command line of ``sophia doctor``; the standard library's parser, so that it needs nothing but torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import sophia
from sophia.doctor.findings import Finding, as_text

__all__ = ["main"]

DESCRIPTION = """\
Check this installation and twenty training steps: of a small model of its own, or of yours.
Ends with 0 if nothing is wrong, 1 if something is, 2 if it was called wrongly."""
MODEL = """\
a function without arguments that returns a model and a batch (a dict for keywords, a tuple for arguments; the
model returns its loss), or a model and a function that takes the model and returns the loss"""
OPTIMIZER = """\
a function that takes the model and returns the optimizer, for settings of your own; or an optimizer class;
Sophia(model, lr=LR) unless given"""


def parser() -> argparse.ArgumentParser:
    """What `sophia doctor` can be asked."""
    made = argparse.ArgumentParser(
        prog="sophia doctor", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", metavar="module:function", help=MODEL)
    made.add_argument("--optimizer", metavar="module:name", help=OPTIMIZER)
    made.add_argument("--steps", type=int, default=20, help="training steps (20)")
    made.add_argument("--lr", type=float, default=1e-3, help="learning rate of Sophia and of AdamW (1e-3)")
    made.add_argument("--json", action="store_true", help="print the findings as JSON instead of text")
    return made


def main(arguments: Sequence[str]) -> int:
    """Examine, print, and return the exit code."""
    asked = parser().parse_args(arguments)
    if asked.steps < 6:
        return _refused(f"--steps is {asked.steps}: whether a loss falls is seen after 6 at the least")
    # Here, because torch takes seconds, which a call for help should not wait for.
    from sophia.doctor.given_model import SubjectError, example, named, subject_named
    from sophia.doctor.installation import check_installation
    from sophia.doctor.machine import check_machine
    from sophia.doctor.trial_steps import check_training

    try:
        subject = example if asked.model is None else subject_named(asked.model)
        optimizer = None if asked.optimizer is None else named(asked.optimizer)
        findings = [
            *check_installation(),
            *check_machine(),
            *check_training(subject, optimizer, steps=asked.steps, lr=asked.lr),
        ]
    except SubjectError as error:
        return _refused(str(error))
    print(_as_json(findings) if asked.json else as_text(findings))
    return int(any(finding.status == "wrong" for finding in findings))


def _refused(text: str) -> int:
    print(f"sophia doctor: {text}", file=sys.stderr)
    return 2


def _as_json(findings: Sequence[Finding]) -> str:
    document = {
        "sophia": sophia.__version__,
        "wrong": sum(finding.status == "wrong" for finding in findings),
        "findings": [vars(finding) for finding in findings],
    }
    return json.dumps(document, indent=1)
