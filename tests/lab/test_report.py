"""The report: made from records alone, closed to what they hold, and alive in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import Planted, write_comparison

from sophia.lab.evidence import read_evidence
from sophia.lab.figures import colours
from sophia.lab.report import write_report
from sophia.lab.series import page_data
from sophia.lab.settings import side_by_side

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&{{ 7*7 }}\u2028"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    assert sum(tag == "script" for tag, _ in page.elements) == 3
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
    assert set(data["metrics"]) == {"validation", "loss", "unclipped", "lr", "grad_norm"}


def test_evaluations_that_know_their_step_alone_get_every_other_cost(tmp_path: Path) -> None:
    """If this fails the validation loss can be drawn against steps only."""
    write_comparison(tmp_path)
    for log in tmp_path.glob("runs/*/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        bare = [{k: r[k] for k in ("kind", "step", "loss")} if r["kind"] == "eval" else r for r in rows]
        log.write_text("\n".join(map(json.dumps, bare)))
    evidence = read_evidence(tmp_path)
    run = next(r for r in page_data(evidence, colours(evidence))["runs"] if r["contender"] == "sophia-g")
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


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; the page is checked as text only")
def test_the_page_lives_in_a_browser(tmp_path: Path) -> None:
    """If this fails the curves are missing or the browser complains, e.g. that the policy blocks a script."""
    html = write_report(write_comparison(tmp_path)).html
    options = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
        --disable-component-update --disable-background-networking --enable-logging=stderr --v=0
        --virtual-time-budget=3000 --dump-dom"""
    done = subprocess.run(
        [
            str(CHROMIUM),
            *options.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            html.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert 'data-curves="12"' in done.stdout, "2 contenders x 2 budgets x (2 seeds + their mean)"
    assert "<canvas" in done.stdout
    assert re.search(r"adamw, 600 steps.*?<dd>4\.\d{4}", done.stdout), "the values at the end are listed"
