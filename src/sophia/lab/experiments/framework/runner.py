"""One experiment from its command to its picture: what ``sophia experiment`` does with a name."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sophia.lab.experiments.framework.definition import Experiment
from sophia.lab.experiments.framework.older_numerics import notice
from sophia.lab.experiments.framework.progress import Progress
from sophia.lab.experiments.framework.records import Records
from sophia.lab.report.loss_curves import STYLE
from sophia.lab.support.errors import LabError, UsageError
from sophia.lab.support.files import locked
from sophia.lab.support.provenance import describe
from sophia.numerics import versions, words

__all__ = ["RESULTS", "draw", "folder_of", "run"]

RESULTS = Path("results/experiments")
"""Where records lie in a clone of the project; the picture beside them, unless another place is given."""


def folder_of(name: str, out: Path, *, quick: bool = False) -> Path:
    """The folder of an experiment's records; quick ones lie apart, so that they never pass for full ones."""
    return out / "quick" / name if quick else out / name


def run(experiment: Experiment, out: Path, progress: Progress, *, quick: bool = False) -> Records:
    """Run what is missing; return the records. Raises ``LabError`` and ``Stopped``."""
    import torch

    torch.set_num_threads(1)  # the results should not depend on the number of cores
    folder = folder_of(experiment.name, out, quick=quick)
    with locked(folder, what="records of the experiment"):
        records = Records(folder)
        if not records.finished and (said := notice(experiment, records)):
            raise LabError(
                f"{folder}: {said} New rows would mix with them. Move that folder away, or give another one "
                "with --out."
            )
        records.open(
            experiment.name,
            version=experiment.version,
            quick=quick,
            environment={
                **describe(threads=1, device="cpu"),
                "numerics": words(versions(*experiment.parts), ones=True),
            },
        )
        experiment.run(quick, records, progress)
        records.finish()
    return records


def draw(experiment: Experiment, records: Records, path: Path | None = None) -> Path:
    """Write the picture, figure.png beside the records unless given another name; the same records give the
    same bytes. Raises ``UsageError`` where there is nothing to draw.
    """
    if not records.rows:
        raise UsageError(
            f"{records.folder} holds no records of {experiment.name}. Write: sophia experiment "
            f"{experiment.name}"
        )
    path = records.folder / "figure.png" if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = experiment.draw(records)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
