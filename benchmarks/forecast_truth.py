"""A forecast beside what it forecast: `sophia compare` foresees its runs, and then does them.

    python benchmarks/forecast_truth.py [--preset quick] [--seeds N] [--budgets N ...] [--workers N]
        [--records FILE]

Seconds of the clock, from the first run's start to the last one's end, and bytes of the runs' folder. The
machine may do other work meanwhile; its load is recorded before, after the measurement, and at the end.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import torch

from sophia.lab.data import corpus, tokens
from sophia.lab.forecast import comparison
from sophia.lab.protocols import plan, protocol_file
from sophia.lab.support import provenance
from sophia.lab.support.json_lines import append_line
from sophia.lab.training.workers import Crew, Events


def main() -> None:
    """Foresee, do, and say both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--records", type=Path, help="a file of lines of JSON that gets one more")
    options = parser.parse_args()

    protocol = protocol_file.chosen(options.preset, None)
    protocol = dataclasses.replace(protocol, seeds=tuple(range(1, options.seeds + 1)))
    if options.budgets:
        protocol = dataclasses.replace(protocol, budgets=tuple(options.budgets))
    text = corpus.load(protocol.data)
    planned = plan.make_plan(protocol, text, tokens.encode(text))
    load = [os.getloadavg()[0]]
    with (
        tempfile.TemporaryDirectory() as folder,
        Crew(Path(folder) / "runs", workers=options.workers) as crew,
    ):
        runs = Path(folder) / "runs"
        left = comparison.remaining(planned.runs, runs)
        began = time.monotonic()
        paces = comparison.paces(crew.measure(comparison.probes(planned.runs, options.workers)))
        measuring = time.monotonic() - began
        load.append(os.getloadavg()[0])
        foreseen = comparison.forecast(
            [left], paces, records=runs, runs=len(left), workers=options.workers, report=False
        )
        print(foreseen.sentence)
        began = time.monotonic()
        crew.do(planned.runs, Events())
        seconds = time.monotonic() - began
        load.append(os.getloadavg()[0])
        disk = sum(path.stat().st_size for path in runs.rglob("*") if path.is_file())
    row = {
        "preset": options.preset,
        "runs": len(left),
        "budgets": list(planned.budgets),
        "workers": options.workers,
        "forecast_seconds": foreseen.seconds,
        "seconds": seconds,
        "measuring_seconds": measuring,
        "forecast_bytes": foreseen.disk,
        "bytes": disk,
        "paces": {name: dataclasses.asdict(pace) for name, pace in paces.items()},
        "load": load,
        "environment": provenance.describe(threads=torch.get_num_threads(), device="cpu"),
    }
    print(f"It took {seconds:.0f} s and {disk:,} bytes.")
    if options.records:
        append_line(options.records, row)


if __name__ == "__main__":
    main()
