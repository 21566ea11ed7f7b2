"""Tables of the pages, as Markdown, from the records of comparisons.

    python studies/own_rules/tables.py [--baseline NAME] [--at STEPS] results/comparisons/half-million [...]
    python studies/own_rules/tables.py --search results/searches/half-million [...]
    python studies/own_rules/tables.py --write docs/research.md [...]

For every contender: mean end loss and standard deviation over seeds at each budget, the difference at the
largest with its 90% interval, and the speed-up over the baseline at equal loss in steps and in processor
seconds, as ``sophia compare`` computes them (docs/report.md). Processor seconds, not those of the clock: the
runs were made beside other work. What lies beyond the baseline's budgets is given as a bound. With
``--baseline`` another contender is the mark; with ``--at`` differences and speed-ups are those at fewer steps
than the largest budget, read off the baseline's whole curve. With ``--search`` the folders are those of
sweeps: trials of each contender, their best and their worst end loss, the best contender first.

A page says above a table which command made it, in a comment such as
``<!-- tables.py results/comparisons/quick -->``. ``--write`` makes all such tables of a page again, and below
one that shows runs of other numerics than today's a sentence that says which; a test holds that nothing
changes.
"""

import argparse
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sophia.lab.analysis.cost_ratio import cost_ratio, in_cost
from sophia.lab.analysis.made_by import other_code
from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.analysis.seed_noise import Estimate, contrast
from sophia.lab.analysis.speedup import Ratio, speedup
from sophia.lab.analysis.verdict import Summary, Verdict, judge
from sophia.lab.analysis.verdict_words import difference_words, ratio_words
from sophia.lab.support.json_lines import whole_lines


def processor(summary: Summary, contender: str, ratio: Ratio | None) -> str:
    """The speed-up in processor seconds, from the one in steps."""
    runs = {(r.contender, r.steps, r.seed): r for r in summary.evidence.runs if r.status == "finished"}
    pairs = []
    for (name, steps, seed), run in runs.items():
        partner = runs.get((summary.evidence.baseline, steps, seed))
        if name == contender and partner is not None:
            own, other = run.number("cpu_seconds"), partner.number("cpu_seconds")
            if own and other:
                pairs.append((other, own))
    cost = cost_ratio(pairs)
    if cost is None or ratio is None:
        return ""
    return f"{ratio_words(in_cost(ratio, cost))}; a step costs {1 / cost.value:.2f}"


def earlier(summary: Summary, contender: str, at: int) -> tuple[Estimate | None, str, Ratio | None]:
    """Difference, word and speed-up at fewer steps than the largest budget."""
    baseline = summary.evidence.baseline
    ends = {
        (r.contender, r.steps, r.seed): r.number("loss")
        for r in summary.evidence.runs
        if r.status == "finished" and (r.contender == baseline or r.steps <= at)
    }
    difference = contrast(ends, {(contender, at): 1.0, (baseline, at): -1.0}, summary.noise)
    ratio = (
        None if summary.curve is None else speedup(ends, contender, baseline, summary.curve, summary.noise)
    )
    sign = 0 if difference is None else difference.sign
    return difference, {1: "slower", -1: "faster"}.get(sign, "not distinguishable"), ratio


def whole(verdict: Verdict) -> tuple[Estimate | None, str, Ratio | None]:
    """The same at the largest budget, as the report has it."""
    return verdict.difference, verdict.word, verdict.speedups[0].ratio if verdict.speedups else None


def lines(folder: Path, baseline: str | None, at: int | None = None) -> Iterator[str]:
    """Head, rule and a row for each contender, the baseline first."""
    evidence = read_evidence(folder)
    if baseline is not None:
        others = (name for name in evidence.contenders if name != baseline)
        evidence = replace(evidence, contenders=(baseline, *others))
    summary = judge(evidence)
    budgets = sorted({row.steps for row in summary.rows})
    verdicts = {verdict.contender: verdict for verdict in summary.verdicts}
    titles = [f"{budget} steps" for budget in budgets]
    titles += [
        f"difference at {'the end' if at is None else f'{at} steps'}, 90% interval",
        "speed-up in steps",
        "in processor seconds",
    ]
    yield f"| contender | {' | '.join(titles)} |"
    yield "|---" * (len(titles) + 1) + "|"
    for name in summary.evidence.contenders:
        cells = []
        for budget in budgets:
            row = next(r for r in summary.rows if (r.contender, r.steps) == (name, budget))
            seeds = "" if row.missing == 0 else f" ({row.finished})"
            sd = "" if row.sd is None else f" ± {row.sd:.3f}"
            cells.append("not run" if row.loss is None else f"{row.loss:.3f}{sd}{seeds}")
        verdict = verdicts.get(name)
        if verdict is None:
            cells += ["", "", ""]
        else:
            difference, word, ratio = whole(verdict) if at is None else earlier(summary, name, at)
            words = "" if difference is None else difference_words(difference)
            words = words.replace("difference ", "").replace(", 90% interval", ",")
            cells.append(f"{words}: {word}")
            cells.append("" if ratio is None else ratio_words(ratio))
            cells.append(processor(summary, name, ratio))
        yield f"| {name} | {' | '.join(cells)} |"
    for problem in (summary.curve_problem, *summary.missing):
        if problem:
            yield f"({problem})"
    yield summary.curve.kind if summary.curve else ""
    for verdict in summary.verdicts:
        if verdict.half_budget is not None:
            yield verdict.half_budget.sentence


OLDER = "Older numerics: "
MARKED = re.compile(
    rf"(?m)^<!-- tables\.py (?P<command>.*) -->\n(?P<table>(?:\|.*\n)*)(?P<older>\n{OLDER}.*\n)?"
)


def search(folders: Iterable[Path]) -> Iterator[str]:
    """Head, rule and a row for each contender of sweeps; one that is in several had the same trials there."""
    losses: dict[str, dict[str, float]] = {}
    for folder in folders:
        for trial in whole_lines(folder / "trials.jsonl"):
            found = math.inf if trial["loss"] is None else trial["loss"]
            losses.setdefault(trial["contender"], {})[trial["run"]] = found
    yield "| searched | trials | best loss | worst loss |"
    yield "|---|---|---|---|"
    for name, of_runs in sorted(losses.items(), key=lambda pair: min(pair[1].values())):
        least, most = min(of_runs.values()), max(of_runs.values())
        worst = "diverged" if math.isinf(most) else f"{most:.3f}"
        yield f"| {name} | {len(of_runs)} | {least:.3f} | {worst} |"


def table(folder: Path, baseline: str | None, at: int | None) -> str:
    """The rows, a line each, and what is to be said of runs of other numerics."""
    rows = "".join(line + "\n" for line in lines(folder, baseline, at) if line.startswith("|"))
    said = other_code(read_evidence(folder).runs)
    return rows + (f"\n{OLDER}{said}.\n" if said else "")


def made_again(page: str, root: Path) -> str:
    """A page with its marked tables as the records under ``root`` have them."""

    def again(found: re.Match[str]) -> str:
        options = arguments().parse_args(shlex.split(found["command"]))
        folders = [root / folder for folder in options.folders]
        made = (
            "".join(line + "\n" for line in search(folders))
            if options.search
            else table(folders[0], options.baseline, options.at)
        )
        return f"<!-- tables.py {found['command']} -->\n{made}"

    return MARKED.sub(again, page)


def arguments() -> argparse.ArgumentParser:
    """Of the command, and of a mark in a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--baseline")
    parser.add_argument("--at", type=int)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--write", action="store_true")
    return parser


if __name__ == "__main__":
    given = arguments().parse_args()
    if given.search:
        print("\n".join(search(given.folders)))
    for path in () if given.search else given.folders:
        if given.write:
            path.write_text(made_again(path.read_text(encoding="utf-8"), Path()), encoding="utf-8")
        else:
            print(f"\n{path}\n")
            print("\n".join(lines(path, given.baseline, given.at)))
