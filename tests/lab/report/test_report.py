"""The report: made from records alone, closed to what they hold, and alive in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, chromium
from matplotlib.text import Annotation
from rich.console import Console
from synthetic import Planted, write_comparison

from sophia.lab.analysis.read_records import read_evidence
from sophia.lab.analysis.settings_table import side_by_side
from sophia.lab.analysis.verdict import judge, summarise
from sophia.lab.jobs.compare import show
from sophia.lab.jobs.pack import unpack
from sophia.lab.report import colours
from sophia.lab.report.colours import looks
from sophia.lab.report.curvature_figure import courses
from sophia.lab.report.loss_curves import draw
from sophia.lab.report.page import SCRIPTS, write_report
from sophia.lab.report.page_data import page_data

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&{{ 7*7 }}\u2028"


class Page(HTMLParser):
    """The page's elements and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.bodies: list[tuple[str, dict[str, str | None], str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if self.cdata_elem is not None:  # inside a script or style element
            self.bodies.append((tag, attributes, data))
        self.words.append(data)


def _page(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).html.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_report_and_its_pictures_are_written(tmp_path: Path) -> None:
    """If this fails `sophia compare` ends without a report, or the README has no picture."""
    files = write_report(write_comparison(tmp_path))
    assert files.curves.read_bytes().startswith(b"\x89PNG")
    assert files.curves_svg.read_text().startswith("<?xml")
    text = files.html.read_text(encoding="utf-8")
    assert "sophia-g is slower than adamw" in text
    assert "0.23 epochs" in text
    first = files.curves.read_bytes(), files.curves_svg.read_bytes(), text
    again = write_report(tmp_path)
    assert first == (
        again.curves.read_bytes(),
        again.curves_svg.read_bytes(),
        again.html.read_text(encoding="utf-8"),
    )


def linear(colour):
    """The colour as light: red, green, blue."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def seen(colour):
    """The colour in OKLab, where distances are about those that are seen."""
    cones = np.cbrt(linear(colour) @ np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074],
                                               [0.0883, 0.2817, 0.6300]]).T)  # fmt: skip
    return (
        cones @ np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]).T
    )


def contrast(one, other):
    """Of two colours, as WCAG 2 defines it."""
    light, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("paper", "place"), [("#ffffff", 0), ("#131417", 1)], ids=["light", "dark"])
def test_a_dozen_contenders_can_be_told_apart_and_read(paper, place) -> None:
    """If this fails two contenders look the same, or a line is too faint on its paper. 0.1 is five times what
    is just seen.
    """
    used = [pair[place] for pair in (colours.BASELINE, *colours.COLOURS)]
    assert len(used) == 12
    for i, one in enumerate(used):
        assert contrast(one, paper) >= 3
        assert all(np.linalg.norm(seen(one) - seen(other)) > 0.1 for other in used[:i])


def test_no_two_of_eighty_contenders_have_one_look() -> None:
    """If this fails many contenders share colour and shape, and a reader takes one for the other."""
    found = looks([f"c{i}" for i in range(80)])
    assert len({(look.light, look.shape) for look in found.values()}) == 80
    assert len({look.shape for look in list(found.values())[:8]}) == 8
    assert len({look.slot for look in found.values()}) == 80


@pytest.mark.parametrize("contenders", [2, 8, 14])
def test_no_label_of_the_picture_is_cut_or_lies_on_another(tmp_path: Path, contenders: int) -> None:
    """If this fails a name cannot be read: many contenders, long names, ends that lie together."""
    names = {f"an-optimizer-of-name-{i}" if i else "adamw": 1 - 0.01 * i for i in range(contenders)}
    figure = draw(summarise(write_comparison(tmp_path, Planted(efficiency=names, budgets=(300, 600)))))
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    words = [
        t
        for axes in figure.axes
        for t in (*axes.findobj(lambda a: isinstance(a, Annotation)), *axes.xaxis.get_ticklabels(),
                  *axes.yaxis.get_ticklabels(), axes.xaxis.label, axes._left_title)
        if t.get_text().strip()
    ]  # fmt: skip
    boxes = {t: t.get_window_extent() for t in words}
    ticks = {
        t for axes in figure.axes for t in axes.get_yticklabels()
    }  # some are beyond the range of the axis
    for text, box in boxes.items():
        assert text in ticks or (box.x0 >= 0 and box.y0 >= 0), f"{text.get_text()!r} is cut"
        assert box.x0 >= 0
        assert text in ticks or (box.x1 <= width and box.y1 <= height), f"{text.get_text()!r} is cut"
    for axes in figure.axes:
        own = [t for t in axes.texts if t.get_text().strip()]
        assert len(own) >= contenders
        for i, one in enumerate(own):
            for other in own[:i]:
                assert not boxes[one].overlaps(boxes[other]), (one.get_text(), other.get_text())


def test_values_from_records_are_text_and_never_markup(tmp_path: Path) -> None:
    """If this fails a run folder from a stranger runs scripts in the reader's browser."""
    write_comparison(tmp_path, data={HOSTILE: HOSTILE}, preset=HOSTILE, note={"of": HOSTILE})
    for run in (tmp_path / "runs").iterdir():
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {HOSTILE: HOSTILE}))
        result = json.loads((run / "result.json").read_text())
        result["environment"] = {HOSTILE: HOSTILE}
        (run / "result.json").write_text(json.dumps(result))
        rows = [json.loads(line) | {HOSTILE: 1.0} for line in (run / "log.jsonl").read_text().splitlines()]
        (run / "log.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    text, page = _page(tmp_path)
    scripts = [a for tag, a in page.elements if tag == "script"]
    assert len(scripts) == 2 + len(SCRIPTS), "uPlot, ours, and the data"
    assert not any(attribute.startswith("on") for _, attributes in page.elements for attribute in attributes)
    assert all(
        a.get("src", "").startswith("data:image/svg+xml;base64,") for t, a in page.elements if t == "img"
    )
    assert "<img src=x" not in text
    assert "49" not in "".join(w for w in page.words if "7*7" in w), "values are not templates"
    assert any(HOSTILE[:30] in w for w in page.words), "the text itself is shown"


def test_the_page_can_fetch_nothing(tmp_path: Path) -> None:
    """If this fails the report needs a network, or tells somebody that it is being read."""
    _, page = _page(write_comparison(tmp_path))
    for tag, attributes in page.elements:
        assert tag not in (
            "iframe",
            "object",
            "embed",
            "base",
            "form" if attributes.get("action") else "base",
        )
        assert "style" not in attributes, "an inline style would need a weaker policy"
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            assert re.match(r"(#|data:)", attributes.get(name) or "#"), (tag, attributes)
    assert not any(re.search(r"@import|url\(", body) for tag, _, body in page.bodies if tag == "style")


def test_the_policy_allows_exactly_the_pages_own_scripts_and_styles(tmp_path: Path) -> None:
    """If this fails the browser blocks the curves, or the policy has grown a hole."""
    _, page = _page(write_comparison(tmp_path))
    (policy,) = (a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert "unsafe" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        bodies = [b for t, a, b in page.bodies if t == tag and "type" not in a]
        hashes = {
            f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in bodies
        }
        assert set(rules[rule].split()) == hashes


def test_the_embedded_data_are_strict_json(tmp_path: Path) -> None:
    """If this fails one NaN in a log leaves the page without curves."""
    write_comparison(tmp_path)
    run = next((tmp_path / "runs").iterdir())
    row = {"kind": "train", "step": 999, "loss": float("nan"), "lr": float("inf"), "grad_norm": True}
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(row | {"seconds": "long"}) + "\n")
    _, page = _page(tmp_path)
    (body,) = (b for t, a, b in page.bodies if a.get("id") == "data")
    data = json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "<" not in body
    assert [c["name"] for c in data["contenders"]] == ["adamw", "sophia-g"]
    assert len(data["runs"]) == 8
    told = {"unclipped", "eps_limited", "h_q05", "h_q50", "h_q95"}
    assert set(data["metrics"]) == {"validation", "loss", "lr", "grad_norm", *told}


def test_the_table_keeps_names_and_numbers_whole_in_80_columns(tmp_path: Path) -> None:
    """Names cut to "sophia-s…", which is any of three."""
    planted = Planted(efficiency={"adamw": 1.0, "sophia-spectral": 1.2}, seeds=(1, 2))
    with (tmp_path / "console").open("w+") as out:
        show(write_comparison(tmp_path / "comparison", planted), Console(file=out, width=80))
        out.seek(0)
        lines = out.read().splitlines()
    rows = [line.split() for line in lines if line.startswith("sophia-spectral ")]
    assert [row[1] for row in rows] == ["300", "600"]
    assert all(re.fullmatch(r"\d\.\d{3} ± \d\.\d{3}", " ".join(row[2:5])) for row in rows)
    assert "…" not in "".join(lines)


def test_records_that_say_zero_of_a_curvature_that_is_not_there(tmp_path: Path) -> None:
    """A picture and a table of h for a rule that has none, from records of before."""
    write_comparison(tmp_path)
    for log in tmp_path.glob("runs/*/log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("\n".join(json.dumps({**row, "has_curvature": 0.0}) for row in lines))
    evidence = read_evidence(tmp_path)
    assert not courses(evidence)
    assert {row.unclipped for row in judge(evidence).rows} == {None}
    assert any(run.number("loss") for run in evidence.runs)


def test_evaluations_that_know_their_step_alone_get_every_other_cost(tmp_path: Path) -> None:
    """If this fails the validation loss can be drawn against steps only."""
    write_comparison(tmp_path)
    for log in tmp_path.glob("runs/*/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        bare = [{k: r[k] for k in ("kind", "step", "loss")} if r["kind"] == "eval" else r for r in rows]
        log.write_text("\n".join(map(json.dumps, bare)))
    evidence = read_evidence(tmp_path)
    run = next(
        r for r in page_data(evidence, looks(evidence.contenders))["runs"] if r["contender"] == "sophia-g"
    )
    x = run["validation"]["x"]
    assert x["step"][:2] == [0, 30]
    assert x["gradient_evaluations"][1] == pytest.approx(31.5)
    assert x["tokens"][1] == 30 * 1024
    assert x["flops"][1] == pytest.approx(30 * 1.05 * 6 * 1_320_000 * 1024, rel=1e-5)
    assert x["seconds"][0] == 0
    assert 0 < x["seconds"][1] < 10


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (
            Planted(unfinished=frozenset({("sophia-g", 600, 1)})),
            "sophia-g at 600 steps: 1 of 2 runs have no result yet",
        ),
        (Planted(diverged=frozenset({("sophia-g", 600, 1)})), "sophia-g at 600 steps: 1 of 2 runs diverged"),
        (Planted(efficiency={"adamw": 1.0}), "nothing to compare"),
        (Planted(budgets=(600,)), "No speed-up: adamw has finished runs at 1 budget"),
        (Planted(seeds=(0,)), "no interval from 1 seed"),
        (
            Planted(
                missing=frozenset(
                    (c, b, s) for c in ("adamw", "sophia-g") for b in (300, 600) for s in (0, 1)
                )
            ),
            "sophia-g: no verdict yet",
        ),
    ],
    ids=["unfinished", "diverged", "alone", "one budget", "one seed", "nothing run"],
)
def test_any_part_of_a_comparison_makes_a_report(tmp_path: Path, planted: Planted, words: str) -> None:
    """If this fails an interrupted comparison shows nothing, or hides what is missing."""
    text, _ = _page(write_comparison(tmp_path, planted))
    assert words in text


def test_settings_that_differ_come_first_and_the_seed_does_not_count(tmp_path: Path) -> None:
    """If this fails a reader cannot see at once what was compared with what."""
    settings = side_by_side(read_evidence(write_comparison(tmp_path)))
    differ = [s.name for s in settings if not s.same]
    assert differ == [s.name for s in settings][: len(differ)]
    assert "optimizer.lr" in differ
    assert "seed" not in [s.name for s in settings]
    assert next(s.values for s in settings if s.name == "optimizer.gamma") == ("—", "0.05")


RESULTS = Path(__file__).parents[3] / "results"
OLD = sorted(path.parent for path in RESULTS.rglob("comparison.json"))


@pytest.mark.parametrize("folder", OLD, ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_committed_comparison_still_makes_a_report(folder: Path, tmp_path: Path) -> None:
    """If this fails a result of the project can no longer be looked at, or packing changes what it says."""
    shown: list[dict[str, bytes | str]] = []
    for name in ("pack", "folders"):
        copy = tmp_path / name / "copy"
        shutil.copytree(folder, copy)
        if name == "folders":
            unpack(copy)
        assert (copy / "runs").is_dir() == (name == "folders")
        with (tmp_path / name / "console").open("w+") as out:
            show(copy, Console(file=out, width=200))
            out.seek(0)
            said = out.read().replace(str(copy), "")
        files = ["report.html", *(path.name for path in copy.glob("*.svg"))]
        shown.append({"console": said, **{file: (copy / file).read_bytes() for file in sorted(files)}})
    assert len(shown[0]) >= 3
    assert shown[0] == shown[1]
    text = (tmp_path / "pack" / "copy" / "report.html").read_text(encoding="utf-8")
    evidence = read_evidence(tmp_path / "pack" / "copy")
    assert not evidence.problems
    assert all(run.status == "finished" for run in evidence.runs)
    (body,) = (b for t, a, b in Page(text).bodies if a.get("id") == "data")
    assert len(json.loads(body)["runs"]) == len(evidence.runs)
    curvature = {"sophia-g", "sophia-h", "sophia-damped"} & set(evidence.contenders)
    assert ("State of the curvature" in text) == bool(curvature)
    assert "What a step costs" in text


def test_everything_that_a_reviewer_needs_is_on_the_page(tmp_path: Path) -> None:
    """If this fails the report lacks a part that it promises."""
    planted = Planted(seeds=(0, 1, 2), budgets=(300, 600, 1200), wsd=True)
    entries = {"adamw": {"settings": {"lr": 0.003}, "warmup": 0.2}, "sophia-g": {"settings": {}}}
    search = {"spaces": {"adamw": {"lr": {"low": 1e-3, "high": 1e-2}, "warmup": [0.05, 0.1, 0.2]}}}
    frozen = {"hash": "0123456789ab", "protocol": {"contenders": entries, "search": search}}
    write_comparison(tmp_path, planted, target=4.5)
    (tmp_path / "protocol.json").write_text(json.dumps(frozen))
    files = write_report(tmp_path)
    assert {p.name for p in files.others} == {
        f"{name}.{kind}" for name in ("speedups", "curvature") for kind in ("png", "svg")
    }
    assert all(path.stat().st_size > 5_000 for path in files.others)
    text = files.html.read_text(encoding="utf-8")
    words = " ".join(Page(text).words)
    for part in (
        "Steps to the target of 4.5 nats",
        "fitted to 3 budgets",  # L(D)
        "What a step costs",
        f"All 18 runs together: {2 * 3 * (1200 + (600 - 480) + (300 - 240)):,} steps",  # the trunks once
        "80877bf",  # the code
        "2.13.0+cpu",
        "To quote",
        "1.32M parameters; 1,024 tokens a step; 3 paired seeds; text sotu; schedule wsd; "
        "protocol quick 0123456789ab; torch-sophia at 80877bf",
        "warmup 0.2 lies at the edge",
        "Nothing was searched for sophia-g",
        "equal up to where the shorter decays",
    ):
        assert part in words, part
    for run in read_evidence(tmp_path).runs:
        assert f"{run.contender}, {run.steps:,} steps, seed {run.seed}: {run.name}" in words


def test_hutchinsons_negative_quantile_has_no_place_on_a_logarithm(tmp_path: Path) -> None:
    """If this fails a negative h ends the report, or the band pretends that it is small."""
    write_comparison(tmp_path)
    for log in tmp_path.glob("runs/*/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("\n".join(json.dumps(r | ({"h_q05": -1e-6} if "h_q05" in r else {})) for r in rows))
    (course,) = courses(read_evidence(tmp_path))
    assert set(course.values["h_q05"]) == {None}
    assert None not in course.values["h_q50"]
    assert "zero or less" in figures_text(write_report(tmp_path).others)


def figures_text(paths) -> str:
    """The comments in which matplotlib repeats the words of an SVG."""
    return " ".join(re.sub(r"\s+", " ", p.read_text()) for p in paths if p.suffix == ".svg")


def test_the_state_of_the_curvature_is_the_mean_over_seeds_that_go_on(tmp_path: Path) -> None:
    """If this fails one diverged seed or a budget cut short bends the picture of h."""
    write_comparison(tmp_path, Planted(seeds=(0, 1, 2), diverged=frozenset({("sophia-g", 600, 1)})))
    (course,) = courses(evidence := read_evidence(tmp_path))
    assert (course.contender, course.budget) == ("sophia-g", 600)
    assert course.steps == tuple(range(5, 601, 5))
    rows = [{r["step"]: r for r in run.train} for run in evidence.runs if (run.contender, run.steps) ==
            ("sophia-g", 600) and run.status == "finished"]  # fmt: skip
    assert len(rows) == 2
    at = course.steps.index(300)
    assert course.values["unclipped"][at] == pytest.approx(
        (rows[0][300]["unclipped"] + rows[1][300]["unclipped"]) / 2
    )
    both = rows[0][300]["h_q50"] * rows[1][300]["h_q50"]
    assert course.values["h_q50"][at] == pytest.approx(both**0.5)


def test_without_a_clip_there_is_no_section_about_one(tmp_path: Path) -> None:
    """If this fails a comparison without Sophia shows an empty chart."""
    files = write_report(write_comparison(tmp_path, Planted(efficiency={"adamw": 1.0, "lion": 1.0})))
    assert [p.name for p in files.others] == ["speedups.png", "speedups.svg"]
    assert "State of the curvature" not in files.html.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page is checked as text only")
def test_the_page_lives_in_a_browser(tmp_path: Path) -> None:
    """If this fails a chart is missing, the browser complains, e.g. that the policy blocks a script, or the
    page asks somebody for something, runs out of the screen of a phone, or cannot be used by keyboard.
    """
    folder = tmp_path / "c"
    folder.mkdir()
    planted = Planted(seeds=(0, 1, 2), budgets=(300, 600), diverged=frozenset({("sophia-g", 600, 1)}))
    address = write_report(write_comparison(folder, planted, target=4.6)).html.as_uri()
    shown = "JSON.stringify(document.documentElement.dataset)"
    with chromium(tmp_path / "profile") as tab:
        for width, height, options in (
            (1280, 900, {}),
            (390, 844, {"phone": True, "dark": True}),
            (718, 1000, {"media": "print"}),
        ):
            tab.screen(width, height, **options)
            tab.open(address)
            assert json.loads(tab.value(shown)) == {"curves": "4", "curvature": "2"}
            assert tab.value("document.documentElement.scrollWidth") <= width, "it runs out of the screen"
            sizes = tab.value("[...document.querySelectorAll('.u-over')].map(e => e.clientWidth > 150)")
            if options.get("media") == "print":
                assert tab.value("[...document.querySelectorAll('.print')].every(e => e.clientWidth > 500)")
                assert tab.value("[...document.querySelectorAll('.live')].every(e => e.clientWidth === 0)")
            else:
                assert sizes == [True] * 4, "curves, ends, and two of the curvature"
                assert tab.value(INKED) == [True] * 4, "a chart is blank"
        tab.screen(1280, 900)
        tab.open(address)
        at_end = tab.value("document.getElementById('readout').innerText")
        assert "validation loss at the end" in at_end
        assert re.search(r"adamw, 600 steps\s*4\.\d{4} seeds 4\.\d{4} to 4\.\d{4}", at_end)
        assert "End loss at 600 steps" in tab.value("document.getElementById('ends-readout').innerText")
        tab.value("document.getElementById('chart').focus()")
        tab.press("Home")
        tab.press("ArrowRight")
        first = tab.value("document.getElementById('readout').innerText")
        tab.press("ArrowRight")
        assert first != at_end
        assert first != tab.value("document.getElementById('readout').innerText")
        tab.value("document.querySelector('#curvature .chart').focus()")
        tab.press("Home")
        assert "At 5 steps: unclipped" in tab.value("document.querySelector('#curvature figure p').innerText")
        tab.value(
            "(() => { const m = document.getElementById('metric'); m.value = 'h_q50';"
            " m.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        assert "h, median at the end" in tab.value("document.getElementById('readout').innerText")
        assert "adamw" not in tab.value("document.getElementById('readout').innerText")
        assert tab.complaints == []
        assert set(tab.requests) == {address}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page is checked as text only")
def test_a_dozen_contenders_fit_on_the_page_and_look_different(tmp_path: Path) -> None:
    """If this fails a comparison of many runs out of the screen, or shows two contenders alike."""
    folder = tmp_path / "c"
    folder.mkdir()
    names = [f"{'sophia' if i > 8 else 'rival'}-of-long-name-{i}" if i else "adamw" for i in range(12)]
    planted = Planted(efficiency={name: 1 - 0.02 * i for i, name in enumerate(names)}, budgets=(300, 600))
    address = write_report(write_comparison(folder, planted)).html.as_uri()
    looks_of = """[...document.querySelectorAll('#contenders .swatch')].map(mark => {
      const style = getComputedStyle(mark);
      return style.backgroundColor + style.clipPath;
    })"""
    with chromium(tmp_path / "profile") as tab:
        for width, height, options in (
            (1280, 900, {}),
            (1280, 900, {"dark": True}),
            (390, 844, {"phone": True}),
            (390, 844, {"phone": True, "dark": True}),
        ):
            tab.screen(width, height, **options)
            tab.open(address)
            assert tab.value("document.documentElement.scrollWidth") <= width, "it runs out of the screen"
            assert all(tab.value(INKED)), "a chart is blank"
            seen_there = tab.value(looks_of)
            assert len(seen_there) == len(set(seen_there)) == 12
            assert tab.value("document.documentElement.dataset.curves") == "24"
        assert tab.complaints == []
        assert set(tab.requests) == {address}


INKED = """[...document.querySelectorAll('canvas')].map(canvas => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let coloured = 0;  // grid and words are grey; curves are not, but for the baseline's
  for (let i = 0; i < pixels.length; i += 4)
    {
      const colours = pixels.slice(i, i + 3);
      coloured += pixels[i + 3] > 60 && Math.max(...colours) - Math.min(...colours) > 40;
    }
  return coloured > 100;
})"""
