from __future__ import annotations

import codecs
import gzip
import io
import json
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources import Rejected
from data_pipeline.sources.lines import read_lines
from tests.data_pipeline.read_sources import TEXTS, jsonl, metadata, read, texts, write_jsonl


def test_jsonl_gives_every_record_once_in_order_whatever_the_parts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    whole = read(jsonl(path), 1 << 20)
    assert texts(whole) == TEXTS
    offset = int(whole[7][1].split("#byte=")[1])
    assert json.loads(path.read_bytes()[offset:].split(b"\n")[0])["text"] == TEXTS[7]
    for part_bytes in (1, 17, 100, 999):
        assert read(jsonl(path), part_bytes) == whole
    assert len(jsonl(path).parts(100)) > 10


def test_jsonl_gzip_and_fields(tmp_path: Path) -> None:
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(
        gzip.compress(b"".join(json.dumps({"body": t, "at": f"u{t[5]}"}).encode() + b"\n" for t in TEXTS))
    )
    assert texts(read(jsonl(packed, text_field="body"), 100)) == TEXTS
    assert read(jsonl(packed, text_field="body", url_field="at"), 100)[3] == (TEXTS[3], "u3")


def test_a_last_line_without_line_end_is_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    assert texts(read(jsonl(tmp_path / "a.jsonl"), 5)) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"not valid JSON \(Unterminated string"),
        (b"", r"a blank line, which is no record"),
        (b" \t\r", r"a blank line, which is no record"),
        (b"[" * 100_000, r"not valid JSON \(nested deeper than 500"),
        (b"[1, 2]", r"holds list, not a JSON object"),
        (b'{"txt": "a", "b": 1}', r"has no field 'text'; its fields: b, txt\. Set text_field"),
        (b'{"text": 5}', r"field 'text' holds int, not a string"),
        (b'{"text": null}', r"field 'text' holds NoneType, not a string"),
        (b'{"text": "a\xff"}', r"not UTF-8 \(byte 11 of the record is 0xff\)"),
        (b'{"text": "a\\ud800"}', r"field 'text' holds half a surrogate pair \(character 1\)"),
    ],
)
@pytest.mark.parametrize("part_bytes", [20, 1 << 20])
def test_a_bad_record_is_named(tmp_path: Path, line: bytes, message: str, part_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 10 + line + b"\n" + b'{"text": "good"}\n' * 3)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 11: {message}"):
        read(jsonl(path), part_bytes)


BAD_LINES = {
    b'{"text": "cut': "not JSON",
    b"": "blank line",
    b"[1, 2]": "no JSON object",
    b'{"txt": "a"}': "no field text",
    b'{"text": 5}': "text is no string",
    b'{"text": "a\xff"}': "not UTF-8",
    b'{"text": "a\\ud800"}': "half a surrogate pair",
}


@pytest.mark.parametrize("part_bytes", [1, 20, 1 << 20])
def test_dropped_records_shift_no_others(tmp_path: Path, part_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    lines = [line for i, bad in enumerate(BAD_LINES) for line in (b'{"text": "%d"}' % i, bad)]
    path.write_bytes(b"\n".join([*lines, b'{"text": "end"}\n']))
    expected = [text for i, reason in enumerate(BAD_LINES.values()) for text in (str(i), f"({reason})")]
    records = read(jsonl(path, on_bad_record="drop"), part_bytes)
    assert texts(records) == [*expected, "end"]
    offsets = [sum(len(line) + 1 for line in lines[:i]) for i in range(len(lines) + 1)]
    assert [url for _, url in records] == [f"{path}#byte={offset}" for offset in offsets]


def test_a_rejected_record_says_where_without_counting_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n[]\n')
    source = jsonl(path, on_bad_record="drop")
    assert list(source.read(source.parts(1 << 20)[0]))[1] == Rejected(
        f"{path}#byte=17",
        "no JSON object",
        f"{path}, byte 17: holds list, not a JSON object. Mend or remove the record.",
    )


@pytest.mark.parametrize("part_bytes", [1, 17, 1 << 20])
def test_the_last_line_may_be_blank_and_no_other(tmp_path: Path, part_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\n \r\n')
    assert texts(read(jsonl(path), part_bytes)) == ["one", "two"]
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n\n\n')
    assert texts(read(jsonl(path, on_bad_record="drop"), part_bytes)) == ["one", "(blank line)", "two", "(blank line)"]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: a blank line, which is no record"):
        read(jsonl(path), part_bytes)


def test_metadata_is_kept_on_request_where_a_record_has_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "tags": ["x"], "n": None, "o": 1}, {"text": "b"}])
    assert metadata(jsonl(path)) == [None, None]
    assert metadata(jsonl(path, metadata_fields=("n", "tags"))) == [{"n": None, "tags": ["x"]}, None]


def test_urls_that_utf8_cannot_hold_become_some_that_it_can(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.jsonl"  # Latin-1 on the disk
    path.write_bytes(b'{"text": "a", "at": "x\\ud83d"}\n{"text": 1}\n')
    source = jsonl(path, on_bad_record="drop")
    shown = f"{tmp_path}/caf\\udce9.jsonl"
    assert read(source, 100) == [("a", f"{shown}#byte=0"), ("(text is no string)", f"{shown}#byte=31")]
    assert read(jsonl(path, on_bad_record="drop", url_field="at"), 100)[0] == ("a", "x\\ud83d")


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 4, 30, 1 << 20])
def test_a_byte_order_mark_at_the_beginning_is_no_part_of_the_first_record(tmp_path: Path, part_bytes: int) -> None:
    """RFC 8259, section 8.1, lets a reader pass over it; anywhere else it is no JSON."""
    path = tmp_path / "a.jsonl"
    lines = b'{"text": "one"}\n', b'{"text": "two"}\n'
    path.write_bytes(codecs.BOM_UTF8 + lines[0] + lines[1])
    assert read(jsonl(path), part_bytes) == [("one", f"{path}#byte=0"), ("two", f"{path}#byte=19")]
    path.write_bytes(lines[0] + codecs.BOM_UTF8 + lines[1])
    assert texts(read(jsonl(path, on_bad_record="drop"), part_bytes)) == ["one", "(not JSON)"]


def test_a_long_line_is_not_read_again_by_every_part_that_lies_in_it(tmp_path: Path) -> None:
    class Counting(io.BytesIO):
        taken = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(-1 if size is None else size)
            self.taken += len(line)
            return line

    handle = Counting(b"x" * 1000 + b"\n" + b"next\n")
    for start in range(1, 1000, 10):
        assert list(read_lines(handle, start, start + 10)) == []
    assert handle.taken < 2000
    assert list(read_lines(handle, 1001, 1002)) == [(1001, b"next\n")]
    assert list(read_lines(handle, 992, 1002)) == [(1001, b"next\n")]
    assert list(read_lines(handle, 991, 1001)) == []
