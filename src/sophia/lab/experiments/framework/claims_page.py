"""The page ``docs/claims.md``: each claim with what the records say of it. Made by ``sophia claims``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sophia.lab.experiments.framework.claims import CLAIMS, Claim
from sophia.lab.experiments.framework.definition import Experiment
from sophia.lab.experiments.framework.older_numerics import notice
from sophia.lab.experiments.framework.records import Records
from sophia.lab.experiments.framework.runner import folder_of

__all__ = ["PICTURES", "page"]

PICTURES = Path("images/claims")
"""Folder of the pictures, beside the page."""

NOT_RUN, NOT_FINISHED = "not run yet", "not finished"
TOP = """# The paper, claim by claim

Made by `sophia claims` from the records under `results/experiments`; not written by hand. A verdict is one of
*holds*, *holds in part*, *not seen at this scale*, *contradicted*, and is computed from the record that it
stands beside; *not run yet* says that there is no record, *not finished* that it is not complete and so has
no verdict. A verdict is about the scale that is said and about nothing larger. Figures of the paper marked
"as recalled" were not held to its text. Every experiment runs again by its command, and where its record is
there it is only drawn again.
"""


def page(experiments: Sequence[Experiment], records: Path, *, link: str) -> str:
    """The Markdown. ``link`` leads from the page to the folder of the records."""
    rows = ["| | claim | verdict | command | record |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        found = [e for e in experiments if claim.number in e.claims]
        for place, experiment in enumerate(found):
            number, text = (str(claim.number), claim.text) if place == 0 else ("", "")
            state = _state(experiment, records)
            where = f"[rows]({link}/{experiment.name}/records.jsonl)" if state != NOT_RUN else ""
            command = f"`sophia experiment {experiment.name}`"
            rows.append(f"| {number} | {text} | **{state}** | {command} | {where} |")
        if not found:
            rows.append(f"| {claim.number} | {claim.text} | **{NOT_RUN}** | | |")
    sections = [_section(claim, experiments, records, link) for claim in CLAIMS]
    return "\n".join([TOP, *rows, "", *sections])


def _state(experiment: Experiment, records: Path) -> str:
    found = Records(folder_of(experiment.name, records))
    if found.finished:
        return experiment.verdict(found).word
    return NOT_FINISHED if found.rows else NOT_RUN


def _section(claim: Claim, experiments: Sequence[Experiment], records: Path, link: str) -> str:
    parts = [
        f"## {claim.number}. {claim.text}\n",
        f"**In the paper.** {claim.paper}\n",
        f"**Others.** {claim.others}\n",
    ]
    if claim.besides:
        parts.append(f"**Here, besides.** {claim.besides}\n")
    for experiment in experiments:
        if claim.number in experiment.claims:
            first = claim.number == experiment.claims[0]
            parts.append(
                _full(experiment, records, link)
                if first
                else _again(experiment, records, experiment.claims[0])
            )
    if not any(claim.number in e.claims for e in experiments):
        parts.append(f"**{NOT_RUN}**: there is no experiment on it.\n")
    return "\n".join(parts)


def _full(experiment: Experiment, records: Path, link: str) -> str:
    """An experiment, under the first claim that it bears on."""
    found = Records(folder_of(experiment.name, records))
    parts = [
        f"### {experiment.name}: {experiment.title}\n",
        f"`sophia experiment {experiment.name}` ({experiment.runtime})\n",
        f"*Claim.* {experiment.claim}\n",
        f"*Scale.* {experiment.scale}\n",
        f"*Expected before the run.* {experiment.expected}\n",
    ]
    if not found.finished:
        rows = f": {len(found.rows)} rows so far" if found.rows else ""
        return "\n".join([*parts, f"*Result.* **{_state(experiment, records)}**{rows}.\n"])
    verdict = experiment.verdict(found)
    parts.append(f"*Result.* {verdict.sentence} **{verdict.word}**\n")
    folder = f"{link}/{experiment.name}"
    parts.append(f"![{experiment.title}]({PICTURES.as_posix()}/{experiment.name}.png)\n")
    parts.append(f"*{experiment.figure}*\n")
    where = "; ".join(_environment(e) for e in found.about.get("environments", []))
    parts.append(
        f"*Record.* [{len(found.rows)} rows]({folder}/records.jsonl): {experiment.record} Run on {where}.\n"
    )
    if said := notice(experiment, found):
        parts.append(f"**Older numerics.** {said}\n")
    return "\n".join(parts)


def _again(experiment: Experiment, records: Path, claim: int) -> str:
    """The same under a further claim: the verdict, and where the rest stands."""
    return (
        f"### {experiment.name}: {experiment.title}\n\n"
        f"**{_state(experiment, records)}**: see claim {claim}.\n"
    )


def _environment(environment: Mapping[str, object]) -> str:
    """Processor, torch and commit in a few words."""
    processor, torch = environment.get("processor"), environment.get("torch")
    return f"{processor}, torch {torch}, commit {environment.get('commit') or 'unknown'}"
