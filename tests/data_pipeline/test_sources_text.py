from __future__ import annotations

import codecs
import gzip
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources import TextSource
from tests.data_pipeline.read_sources import TEXTS, read, texts


def test_text_files_are_documents(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS[:9]):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "9.txt.gz").write_bytes(gzip.compress(b"packed"))
    source = TextSource(kind="text", domain="d", files=(str(tmp_path / "*.txt*"),))
    expected = [(text, str(tmp_path / f"{i}.txt")) for i, text in enumerate(TEXTS[:9])]
    for part_bytes in (1, 100, 10_000):
        assert read(source, part_bytes) == [*expected, ("packed", str(tmp_path / "9.txt.gz"))]
    (tmp_path / "0.txt").write_bytes(b"ab\xe9")
    with pytest.raises(DataError, match=r"0\.txt: not UTF-8 \(byte 2 of the record is 0xe9\)"):
        read(source, 100)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "END", "END|"])
def test_separated_text_does_not_hang_on_the_parts(tmp_path: Path, line_end: str, last: str) -> None:
    documents = ["one", "two|lines", "", "", "END here is no separator", "a" * 50, "|blank lines||", "last"]
    content = "|END|".join(documents) + ("|" + last if last else "")
    path = tmp_path / "a.txt"
    path.write_bytes(content.replace("|", line_end).encode())
    source = TextSource(kind="text", domain="d", files=(str(path),), separator="END")
    whole = read(source, 1 << 20)
    assert texts(whole) == [text.replace("|", line_end) for text in documents]
    offset = int(whole[-1][1].split("#byte=")[1])
    assert path.read_bytes()[offset:].startswith(b"last")
    for part_bytes in range(1, 60):
        assert read(source, part_bytes) == whole, part_bytes


def test_separated_text_names_the_line_of_a_bad_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\nEND\nb\nc\xff\nEND\n")
    with pytest.raises(DataError, match=r"a\.txt, line 4: not UTF-8"):
        read(TextSource(kind="text", domain="d", files=(str(tmp_path / "a.txt"),), separator="END"), 1)


def test_text_that_is_not_utf8_is_dropped_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\nEND\nb\nc\xff\nEND\nd")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    files = (str(tmp_path / "*.txt"),)
    whole = TextSource(kind="text", domain="d", files=files, on_bad_record="drop")
    assert texts(read(whole, 1)) == ["(not UTF-8)", "(not UTF-8)"]
    for part_bytes in range(1, 20):
        separated = read(whole.model_copy(update={"separator": "END"}), part_bytes)
        assert texts(separated) == ["a", "(not UTF-8)", "d", "(not UTF-8)"]
        assert separated[1][1] == f"{tmp_path}/a.txt#byte=6"


def test_a_byte_order_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\nEND\n" + codecs.BOM_UTF8 + b"two")
    source = TextSource(kind="text", domain="d", files=(str(tmp_path / "a.txt"),))
    assert texts(read(source, 100)) == ["one\nEND\n\ufefftwo"]
    separated = source.model_copy(update={"separator": "END"})
    assert texts(read(separated, 100)) == ["one", "\ufefftwo"], "inside a file it is a character as any other"
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"END\none")
    for part_bytes in range(1, 12):
        assert read(separated, part_bytes) == [
            ("", f"{tmp_path}/a.txt#byte=0"),
            ("one", f"{tmp_path}/a.txt#byte=7"),
        ]


def test_a_separator_line_ends_in_one_line_end(tmp_path: Path) -> None:
    """With more at its end it would be found, or not, by where the parts were cut."""
    (tmp_path / "a.txt").write_bytes(b"one\nEND\r\r\ntwo\nEND\r\nthree")
    source = TextSource(kind="text", domain="d", files=(str(tmp_path / "a.txt"),), separator="END")
    for part_bytes in range(1, 30):
        assert texts(read(source, part_bytes)) == ["one\nEND\r\r\ntwo", "three"]


@pytest.mark.parametrize("separator", ["\n", "a\nb", "END\r"])
def test_a_separator_is_one_line(separator: str) -> None:
    with pytest.raises(ValueError, match="holds a line break, so no line can be it"):
        TextSource(kind="text", domain="d", files=("a.txt",), separator=separator)
