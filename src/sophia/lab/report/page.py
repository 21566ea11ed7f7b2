"""The report of a comparison: one HTML file that needs nothing else, and its pictures as PNG and SVG.

Made from records only, finished or not. What the records say is untrusted text: the template escapes all of
it, the data of the curves are JSON in which no `<` remains, and a content security policy allows the page's
own scripts and style sheets by their hash and nothing else, so that the file fetches nothing and
runs nothing foreign even if escaping failed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sophia.lab.analysis.quotation import quotation
from sophia.lab.analysis.read_records import Evidence, Run, number
from sophia.lab.analysis.search_notes import edges, unsearched
from sophia.lab.analysis.seed_noise import LEVEL
from sophia.lab.analysis.settings_table import flat, side_by_side
from sophia.lab.analysis.verdict import Summary, summarise
from sophia.lab.analysis.verdict_words import (
    difference_words,
    heading,
    ratio_words,
    route_sentence,
    spent_sentence,
)
from sophia.lab.report import curvature_figure, loss_curves, speedup_figure
from sophia.lab.report.colours import css, looks
from sophia.lab.report.page_data import page_data
from sophia.lab.report.speedup_bar import TICKS, WIDTH, bar
from sophia.lab.support.files import write_atomically

HERE = Path(__file__).parent
MOST_CONFIGURATIONS = 200
SCRIPTS = ("charts.js", "report.js", "ends.js", "curvature.js")


@dataclass(frozen=True)
class ReportFiles:
    """What `write_report` wrote."""

    html: Path
    curves: Path
    """The picture as PNG."""
    curves_svg: Path
    others: tuple[Path, ...] = ()
    """Further pictures, PNG and SVG: the forest plot and the state of the curvature, where there is any."""


def write_report(folder: Path) -> ReportFiles:
    """Write report.html and its pictures into the folder of a comparison, whatever part of it has run."""
    summary = summarise(folder)
    drawn = {
        "curves": loss_curves.draw(summary),
        "speedups": speedup_figure.draw(summary),
        "curvature": curvature_figure.draw(summary.evidence),
    }
    written = {name: loss_curves.save(f, folder, name) for name, f in drawn.items() if f is not None}
    html = folder / "report.html"
    page = render(summary, {name: svg.read_bytes() for name, (_, svg) in written.items()})
    write_atomically(html, lambda file: file.write(page.encode()))
    others = tuple(path for name, paths in written.items() if name != "curves" for path in paths)
    return ReportFiles(html, *written["curves"], others)


def render(summary: Summary, pictures: Mapping[str, bytes]) -> str:
    """The page as text; `pictures` are the SVGs shown in print and where scripts are off."""
    vendor, templates = HERE / "vendor" / "uplot", HERE / "templates"
    scripts = [_inline(vendor / "uPlot.iife.min.js"), *(_inline(templates / name) for name in SCRIPTS)]
    styles = [_inline(vendor / "uPlot.min.css"), _inline(templates / "report.css")]
    look = looks(summary.evidence.contenders)
    styles.append(Markup(css(look)))
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "short": short}
    evidence = summary.evidence
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        evidence=evidence,
        policy=_policy(scripts, styles),
        scripts=scripts,
        styles=styles,
        data=_json(page_data(evidence, look, summary.curve)),
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        licence=(vendor / "LICENSE").read_text(encoding="utf-8"),
        slot={name: own.slot for name, own in look.items()},
        bar=bar,
        ticks=TICKS,
        width=WIDTH,
        ratio_words=ratio_words,
        heading=heading,
        difference_words=difference_words,
        route=route_sentence,
        level=f"{LEVEL:.0%}",
        quotations=[quotation(summary, verdict) for verdict in summary.verdicts],
        spent=spent_sentence(summary.spent),
        unsearched=unsearched(evidence.protocol),
        edges=edges(evidence.protocol),
        facts=_facts(evidence),
        environments=_environments(evidence.runs),
        settings=side_by_side(evidence),
        configurations=_configurations(evidence),
    )
    return page.lstrip() + "\n"


def count(value: float | None, digits: int = 0) -> str:
    """A number with thousands separated, or an em dash for nothing.

    >>> count(12345.6), count(None)
    ('12,346', '—')
    """
    return "—" if value is None else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """A large count with its power of a thousand.

    >>> short(4.87e12), short(1_320_000), short(640), short(None)
    ('4.87 T', '1.32 M', '640', '—')
    """
    if value is None:
        return "—"
    for size, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {sign}"
    return f"{value:.3g}"


def _inline(path: Path) -> Markup:
    """A file of ours as text for a script or style element; it must not be able to end that element."""
    text = path.read_text(encoding="utf-8")
    if "</" in text:
        raise ValueError(
            f"{path.name} holds '</', which would end its element in the page; write it as '<\\/'"
        )
    return Markup(text)


def _policy(scripts: Iterable[str], styles: Iterable[str]) -> str:
    def hashes(texts: Iterable[str]) -> str:
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts
        )

    own = f"script-src {hashes(scripts)}; style-src {hashes(styles)}"
    return f"default-src 'none'; {own}; img-src data:; base-uri 'none'; form-action 'none'"


def _json(value: Any) -> Markup:
    """JSON that can neither end its script element nor open a comment in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _facts(evidence: Evidence) -> dict[str, str]:
    """What was run, from the plan and the records."""
    finished = [r for r in evidence.runs if r.status == "finished"]
    facts = {
        "Preset": evidence.preset or "—",
        "Budgets": ", ".join(f"{b:,}" for b in evidence.budgets) + " steps",
        "Seeds": ", ".join(str(s) for s in evidence.seeds),
        "Runs": f"{len(finished)} finished of {len(evidence.runs)}",
    }
    largest = max(finished, key=lambda r: r.steps, default=None)
    if largest is not None:
        tokens, steps = largest.number("tokens"), largest.number("steps")
        facts["Model"] = f"{count(largest.number('parameters'))} parameters"
        if tokens is not None and steps:
            facts["Tokens a step"] = count(tokens / steps)
            facts["Tokens read at the largest budget"] = count(tokens) + _epochs(tokens, evidence)
    known = {"version", "preset", "contenders", "seeds", "budgets", "baseline", "data", "runs"}
    known |= {"settings", "target"}  # shown elsewhere
    if evidence.protocol_hash:
        facts["Protocol"] = evidence.protocol_hash
    rest = {k: v for k, v in evidence.comparison.items() if k not in known}
    for key, value in flat({"data": evidence.data, **rest}).items():
        words = key.replace("_", " ").replace(".", ": ")
        grouped = (
            f"{int(value):,}" if value.isdecimal() and value.isascii() and 4 < len(value) < 19 else value
        )
        facts.setdefault(words[:1].upper() + words[1:], grouped)
    return facts


def _epochs(tokens: float, evidence: Evidence) -> str:
    """How often the corpus was read, if the records tell its size."""
    for key in ("train_tokens", "training_tokens", "tokens"):
        size = number(evidence.data.get(key))
        if size:
            return f" ({tokens / size:.2g} epochs)"
    return ""


def _environments(runs: Iterable[Run]) -> dict[str, str]:
    """Versions and machine; a value that differs between runs is listed with every one that occurs."""
    seen: dict[str, dict[str, None]] = {}
    for run in runs:
        environment = run.result.get("environment")
        for key, value in flat(environment).items() if isinstance(environment, dict) and environment else ():
            if not key.startswith("fingerprint"):  # numbers for the lab, not for people
                seen.setdefault(key, {})[value] = None
    return {key: "; ".join(values) for key, values in seen.items()}


def _configurations(evidence: Evidence) -> list[tuple[str, str]]:
    """Every run's label and whole configuration."""
    found = []
    for run in evidence.runs[:MOST_CONFIGURATIONS]:
        if run.config:
            label = f"{run.contender}, {run.steps:,} steps, seed {run.seed}: {run.name}"
            found.append((label, json.dumps(run.config, indent=2, ensure_ascii=False)))
    return found
