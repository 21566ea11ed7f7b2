"""The JSON file that a measurement leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sophia.lab.support import files, provenance


def write(path: Path | None, *, threads: int, **fields: Any) -> None:
    """Write what was measured, with the day, the load of the machine and the environment; nothing if there is
    no path.
    """
    if path is None:
        return
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "load_of_the_machine": round(os.getloadavg()[0], 1),
        "environment": provenance.describe(threads=threads, device="cpu"),
    }
    files.write_json(path, {**about, **fields})
