"""Finished runs of an earlier command: whether today's code would make them again.

A run is named by its settings and the versions of its numbers, so one of other versions has another name and
is never taken for today's. The fingerprint in its result tells the rest: an edited optimizer, another torch,
a version that nobody raised. Where it differs from today's the lab refuses to go on, because one verdict over
two codes is about neither. Where a result has none (older records, runs on several processes) it says so and
goes on. Another kernel of the step differs in rounding: that is said too, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sophia.lab.analysis import made_by
from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.config.run import Run
from sophia.lab.optimizers import table
from sophia.lab.protocols.plan import Plan
from sophia.lab.support.dataclass_json import canonical, differences, to_json
from sophia.lab.support.errors import UsageError
from sophia.lab.support.files import read_json
from sophia.lab.training.fingerprint import TOLERANCE, difference, fingerprint
from sophia.lab.training.run_folder import Record

__all__ = ["check", "check_names"]


def check(runs: Iterable[Run], folder: Path) -> list[str]:
    """Compare those of the runs that ended in ``folder`` with today's code; return what is to be said.

    Raises ``UsageError`` if other code made some of them.
    """
    ended = [(r, e) for r in runs if (e := Record(folder, r).result()) is not None]
    other: list[tuple[Run, float, str]] = []
    unmarked: list[str] = []
    rounded: list[str] = []
    for run, end in ended:
        environment = end.get("environment") or {}
        now, then = fingerprint(table.of(run.optimizer), run.device), environment.get("fingerprint")
        if now is None or not isinstance(then, list):
            unmarked.append(_code(environment))
            continue
        if (apart := difference(then, now.numbers)) > TOLERANCE:
            other.append((run, apart, _code(environment)))
        elif now.kernels != environment.get("kernels", ""):
            rounded.append(f"{environment.get('kernels')}, and today it is {now.kernels}")
    if other:
        apart = max(apart for _, apart, _ in other)
        names = " ".join(sorted({run.hash for run, _, _ in other}))
        raise UsageError(
            f"{_were(other, ended)} made by other code ({_each(code for _, _, code in other)}): a few steps "
            f"of {_each(run.optimizer.contender for run, _, _ in other)} on a fixed problem came out "
            f"{apart:.1e} apart from what they are today (torch, the optimizer or Sophia has changed). One "
            f"verdict over two codes would be about neither. Give another folder with --out, or delete "
            f"these of {folder} to have them made again: {names}"
        )
    said = []
    if unmarked:
        said.append(
            f"{_were(unmarked, ended)} recorded without a fingerprint ({_each(unmarked)}): that today's code "
            "would give their numbers is not checked."
        )
    if rounded:
        said.append(
            f"{_were(rounded, ended)} made by another kernel of the step ({_each(rounded)}): the two differ "
            "in rounding."
        )
    return said


def check_names(folder: Path, planned: Plan) -> None:
    """Raise ``UsageError`` if the comparison in ``folder`` is the planned one but for the versions of numbers
    in the names of its runs.
    """
    path = folder / "comparison.json"
    # What else differs is said by those who freeze the plan.
    if not path.exists() or differences(read_json(path), planned.to_json()) != ["runs"]:
        return
    runs = read_evidence(folder).runs
    configurations = {_without_numerics(run.config) for run in runs if run.config}
    if not configurations <= {_without_numerics(to_json(run)) for run in planned.runs}:
        return
    if said := made_by.other_code(runs):
        raise UsageError(
            f"{folder}: {said}. Going on would mix two codes under one verdict, and today's may be another. "
            f"Give another folder with --out for it; `sophia report {folder}` shows what the other code gave."
        )
    if any(run.result for run in runs):
        raise UsageError(
            f"{folder}: its runs are named as before names said which numbers a run holds. Those that they "
            f"hold are today's ({made_by.today(runs)}), so nothing is to be done again: `sophia report "
            f"{folder}` shows them. Give another folder with --out to have them made again all the same."
        )


def _without_numerics(config: Mapping[str, Any]) -> str:
    optimizer = config.get("optimizer")
    plain = dict(optimizer) if isinstance(optimizer, Mapping) else {}
    plain.pop("numerics", None)
    return canonical({**config, "optimizer": plain})


def _were(some: list[Any], of: list[Any]) -> str:
    return f"{len(some)} of {len(of)} finished runs {'was' if len(some) == 1 else 'were'}"


def _each(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words))


def _code(environment: Mapping[str, Any]) -> str:
    return str(environment.get("commit") or environment.get("code") or "unknown")
