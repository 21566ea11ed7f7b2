"""All that the project could not measure without a GPU, in one command of at most eight minutes on an H100.

    python benchmarks/gpu_day.py --out FILE [--tokens FILE ...] [--only PART ...] [--minutes N] [--dry-run]

environment   device, driver, versions, commit
correctness   every path of the step on the device against the plain rule in float64 on the CPU
step-ratios   the step alone over AdamW(fused=True) at 124M and 770M parameters; state; memory of a step
whole-step    a training step with its refreshes over AdamW's, GPT-2 124M in bfloat16 autocast, and its peak
graphs        the step in a CUDA graph and under torch.compile: equal to the eager one? its time
race          AdamW, the published rule, the spectral rule and Muon on GPT-2 124M, 0.5M tokens a step

A part is a line of JSON, on the disk as soon as it is known; one that is in the file and went well is not
done again, and the last line is a summary. A part that fails or takes too long leaves its error and the next
one begins. The exit code is 1 if a path is not the rule (correctness, graphs), and 2 for arguments that
cannot be meant. ``--tokens`` takes shards of 16-bit tokens of GPT-2's vocabulary (those with "val" in their
name are held out), or one folder as ``sophia pretrain`` does; without it the built-in text is read.
``--dry-run`` does all of it at toy size on the CPU in half a minute: its numbers mean nothing.
"""

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_parts import correctness, graphs, race, step_ratios, whole_step
from gpu_parts.scene import ABSENT, Scene

from sophia.lab.support import provenance
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.support.json_lines import append_line, whole_lines

BEGAN = time.monotonic()
AROUND = 30.0
"""Seconds of the eight minutes that are spent before ``BEGAN``, on imports, and after the last part."""
SUMMARY = "summary"


class OutOfTime(BaseException):
    """A part took much longer than its share. No Exception, so that nothing on the way takes it for one."""


def environment(scene: Scene) -> dict[str, Any]:
    """Where the numbers come from."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    about = provenance.describe(threads=torch.get_num_threads(), device=scene.device)
    return {
        **about,
        "date": time.strftime("%Y-%m-%d"),
        "triton": triton,
        "cuda": torch.version.cuda,
        "driver": ABSENT if scene.toy else driver(),
        "memory": ABSENT if scene.toy else torch.cuda.get_device_properties(0).total_memory,
        "capability": ABSENT if scene.toy else list(torch.cuda.get_device_capability()),
        "says": f"{about['processor']}, torch {torch.__version__}, commit {about['commit']}",
    }


def driver() -> str | None:
    """Version of the driver, by the program that comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# name: what does it, seconds of its share (the race has the rest), whether it tells right from wrong
PARTS: dict[str, tuple[Callable[[Scene], dict[str, Any]], float, bool]] = {
    "environment": (environment, 10, False),
    "correctness": (correctness.measure, 50, True),
    "step-ratios": (step_ratios.measure, 90, False),
    "whole-step": (whole_step.measure, 60, False),
    "graphs": (graphs.measure, 60, True),
    "race": (race.measure, float("inf"), False),
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTime`` inside after so many seconds, or at once if there are none."""
    if seconds <= 0:
        raise OutOfTime("no time was left for it")

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"it was stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def do(name: str, scene: Scene, limit: float) -> dict[str, Any]:
    """The line of a part."""
    measure, _, judges = PARTS[name]
    began = time.monotonic()
    row: dict[str, Any] = {"part": name, "dry_run": scene.toy}
    try:
        with limited(limit):
            row |= {"ok": True, **measure(scene)}
    except (Exception, OutOfTime) as error:  # the other parts are measured all the same
        said = f"{type(error).__name__}: {error}"[:1000]
        row |= {"ok": False, "error": said, "says": f"failed: {said}"}
    row["judges"] = judges
    row["load_of_the_machine"] = round(os.getloadavg()[0], 1)
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def known(path: Path, *, dry_run: bool) -> dict[str, dict[str, Any]]:
    """The last line of each part in the file. Raises ``UsageError`` for a file of the other kind."""
    found = {row["part"]: row for row in whole_lines(path)}
    if any(row["dry_run"] is not dry_run for row in found.values()):
        raise UsageError(
            f"{path} holds {'a measurement' if dry_run else 'a dry run'}, and one file cannot be both. Give "
            "another --out."
        )
    return found


def run(options: argparse.Namespace) -> int:
    """Do what is not there, and sum up."""
    if not options.dry_run and not torch.cuda.is_available():
        raise UsageError("torch sees no GPU here, and the parts are of a GPU's size. Try --dry-run.")
    if lost := [path for path in options.tokens if not path.exists()]:
        raise UsageError(f"{lost[0]} does not exist. Give --tokens files or a folder that do.")
    found = known(options.out, dry_run=options.dry_run)
    missing = [name for name in options.only or PARTS if not found.get(name, {}).get("ok")]
    ends = BEGAN + 60 * options.minutes - AROUND
    device = "cpu" if options.dry_run else "cuda"
    for number, name in enumerate(missing, 1):
        now = time.monotonic()
        share = min(PARTS[name][1], ends - now)
        print(f"[{number}/{len(missing)}] {name}, at most {max(0, share):.0f} s", flush=True)
        scene = Scene(device, now + share, tuple(options.tokens))
        # The part looks at the time between two measurements; only what hangs is stopped.
        found[name] = do(name, scene, min(1.5 * share, ends - now + AROUND / 3))
        append_line(options.out, found[name], sync=True)
        print(f"    {found[name]['says']} ({found[name]['seconds']:.0f} s)", flush=True)
        scene.release()
    wrong = [name for name, row in found.items() if row.get("judges") and not row["ok"]]
    if missing:
        parts = {name: found[name]["says"] if name in found else "not done" for name in PARTS}
        summary = {"wrong": wrong, "parts": parts, "seconds": round(time.monotonic() - BEGAN, 1)}
        append_line(options.out, {"part": SUMMARY, "dry_run": options.dry_run, **summary}, sync=True)
    print(f"{'wrong: ' + ', '.join(wrong) if wrong else 'nothing is wrong'}; {options.out}", flush=True)
    return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, nargs="+", default=[])
    parser.add_argument("--only", nargs="+", choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole; the race has what is left")
    parser.add_argument("--dry-run", action="store_true")
    try:
        return run(parser.parse_args(arguments))
    except LabError as error:
        print(error, file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
