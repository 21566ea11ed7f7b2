"""Names and lengths of the files of the package, and the paths that CONTRIBUTING names."""

import re
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import pytest

from layers import SOURCE, files
from sophia import update_rule

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
LONGEST = 350

# Two folders with a file for each subcommand: its options, and its work.
OF_SUBCOMMANDS = {"lab/commands", "lab/jobs"}
# Another name that several files have, the one thing that it names in all of them, and where they lie.
REPEATED = {
    "__init__.py": ("what its folder is", "*"),
    "claims.py": ("the paper's claims and what is seen of them", "lab/commands", "lab/experiments/framework"),
    "experiment.py": (
        "an experiment: to run one by name, or the one of its folder",
        "lab/commands",
        "lab/experiments/*",
    ),
    "figure.py": ("the picture of the experiment of its folder", "lab/experiments/*"),
}


def objections(paths, repeated):
    """What is wrong with the names of files, given relative to the package."""
    folders = defaultdict(list)
    for path in paths:
        folders[path.name].append(path.parent.as_posix())
    found = []
    for name, places in folders.items():
        _, *allowed = repeated.get(name, ("a subcommand", *OF_SUBCOMMANDS))
        strangers = [place for place in places if not any(fnmatch(place, pattern) for pattern in allowed)]
        if len(places) > 1 and strangers:
            found.append(f"{name} in {', '.join(sorted(places))}")
    return found + [f"{name} is not repeated" for name in repeated if len(folders[name]) < 2]


def test_no_name_of_a_file_stands_for_two_things():
    """A reader who looks for a file by its name and opens another: rename it, or say in the table what the
    name means in both.
    """
    found = objections([path.relative_to(SOURCE) for path in files()], REPEATED)
    assert not found, found


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["step/noise.py", "lab/analysis/noise.py"], ["noise.py in lab/analysis, step"]),
        (["step/plan.py", "plan.py"], ["plan.py in ., step"]),
        (["lab/commands/audit.py", "lab/jobs/audit.py"], []),
        (
            ["lab/commands/audit.py", "lab/jobs/audit.py", "audit.py"],
            ["audit.py in ., lab/commands, lab/jobs"],
        ),
        (["lab/commands/audit.py", "lab/data/audit.py"], ["audit.py in lab/commands, lab/data"]),
        (["lab/experiments/one/figure.py", "lab/experiments/two/figure.py"], []),
        (
            ["lab/experiments/one/figure.py", "lab/report/figure.py"],
            ["figure.py in lab/experiments/one, lab/report"],
        ),
        (["lab/experiments/one/figure.py"], ["figure.py is not repeated"]),
        (["step/noise.py", "lab/analysis/seed_noise.py"], []),
    ],
)
def test_the_check_of_names_itself(paths, found):
    """A check that overlooks a repetition would hold nothing."""
    paths = [Path(path) for path in paths]
    table = {path.name: REPEATED[path.name] for path in paths if path.name in REPEATED}
    assert objections(paths, table) == found


def test_a_long_file_says_why():
    """Files that grow until nobody reads them whole."""
    for path in files():
        lines = path.read_text().splitlines()
        if len(lines) > LONGEST:
            assert "Over 350 lines because" in " ".join(lines[:12]), (
                f"{path.relative_to(SOURCE)} has {len(lines)} lines: split it along its idea, or write "
                "'Over 350 lines because ...' at its top"
            )


def test_the_lab_is_folders():
    """Modules side by side at the top of the lab, without an order among them."""
    assert len(list((SOURCE / "lab").glob("*.py"))) < 6


def test_contributing_names_files_that_exist():
    """A newcomer sent to a file that has moved."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(
        r"`((?:src|tests|docs|scripts|benchmarks|studies|results)/[\w/.-]*)`|\]\(([\w/.-]+)\)", text
    )
    paths = [a or b for a, b in named]
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_glossary_agrees_with_the_rule():
    """A symbol that means one thing in the code and another on the page: the table of names in
    ``update_rule.py`` is the truth.
    """
    rows = re.findall(
        r"^    (\S+) {2,}(\S.*?) {2,}(\S.*?) {2,}(\S.*?)(?: {2,}\(.*\))?$", update_rule.__doc__, re.M
    )
    names = {
        here: (paper, official) for here, paper, _, official in rows if here not in ("here", "---------")
    }
    assert len(names) == 11
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in GLOSSARY.read_text().splitlines()]
    page = {row[0]: (row[3], row[4]) for row in cells if len(row) == 5}
    for here, (paper, official) in names.items():
        said = official.split(" (")[0].split("  ")[0]
        assert page[here] == (paper, said), here


def test_the_glossary_links_to_files_that_exist():
    """A definition that has moved."""
    links = re.findall(r"\]\(([^)#]+)\)", GLOSSARY.read_text())
    assert len(links) > 40
    assert not [link for link in links if not (GLOSSARY.parent / link).exists()]


def test_texts_in_the_package_name_files_that_exist():
    """A docstring that sends its reader to a file under an old name."""
    known = {
        path.name
        for folder in ("src", "tests", "benchmarks", "studies", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    }
    lost = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path in files()
        for name in re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", path.read_text())
        if name not in known | {"prepare.py"}  # nanoGPT's
    }
    assert not lost


@pytest.mark.parametrize(
    "readme", sorted((ROOT / "studies").glob("*/README.md")), ids=lambda p: p.parent.name
)
def test_every_study_says_its_question_its_command_and_its_record(readme):
    """A script whose answer nobody finds, or a record whose command nobody knows."""
    text, folder = readme.read_text(), readme.parent
    scripts = {path.name for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert set(re.findall(rf"`python studies/{folder.name}/(\w+\.py)", text)) == scripts
    protocols = {path.name for path in folder.glob("protocols/*.toml")}
    assert protocols <= set(re.findall(r"protocols/([\w.-]+\.toml)", text))
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 2
    assert not [link for link in links if not (folder / link).exists()]
    named = re.findall(r"(?:studies|results)/[\w/.-]+", text)
    assert not [path for path in named if not (ROOT / path).exists()]
