from __future__ import annotations

import datetime
import gzip
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import DataError, UserError
from data_pipeline.prepare import PrepareSettings
from data_pipeline.settings import build_settings
from data_pipeline.sources import (
    DatasetsSource,
    Document,
    JsonlSource,
    ParquetSource,
    Rejected,
    Source,
    StdlibSource,
    TextSource,
)

TEXTS = [f"text {i} " + "\u00e9x" * (i * 7 % 40) + "\n" * (i % 3) for i in range(50)]


def read(source: Source, part_bytes: int) -> list[tuple[str, str]]:
    records = [record for part in source.parts(part_bytes) for record in source.read(part)]
    return [(record.text if isinstance(record, Document) else f"({record.reason})", record.url) for record in records]


def metadata(source: Source) -> list[object]:
    return [getattr(record, "metadata", "rejected") for part in source.parts(1 << 20) for record in source.read(part)]


def texts(documents: Iterable[tuple[str, str]]) -> list[str]:
    return [text for text, _ in documents]


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def jsonl(*files: Path, **options: object) -> JsonlSource:
    return JsonlSource.model_validate(
        {"kind": "jsonl", "domain": "d", "files": tuple(str(path) for path in files), **options}
    )


# jsonl


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
        (b"[" * 100_000, r"not valid JSON \(maximum recursion depth"),
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


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "good"}\n' * 1000)[:-30])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: damaged after \d+ unpacked bytes"):
        read(jsonl(packed), 100)


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


# packed files


ZSTD = zstandard.ZstdCompressor(write_checksum=True)
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


def zstd_frames(lines: list[bytes], frames: int) -> bytes:
    return b"".join(SKIPPABLE + ZSTD.compress(b"".join(lines[i::frames])) + SKIPPABLE for i in range(frames))


@pytest.mark.parametrize("frames", [1, 3])
def test_zstd_of_any_number_of_frames(tmp_path: Path, frames: int) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS] * 2000
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd_frames(lines, frames))
    assert texts(read(jsonl(path), 1)) == [text for i in range(frames) for text in (TEXTS * 2000)[i::frames]]
    assert len(jsonl(path).parts(1)) == 1
    command = ["zstd", "-q", "-T2", "-f", "-o", str(path)]
    subprocess.run(command, input=b"".join(lines), check=True)
    assert texts(read(jsonl(path), 1)) == TEXTS * 2000


def test_a_zstd_file_cut_anywhere_or_flipped_is_an_error(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    path = tmp_path / "a.jsonl.zst"
    whole = ZSTD.compress(b"".join(lines))
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: (damaged after \d+ unpacked|is empty or not packed)"):
            read(jsonl(path), 1)
    path.write_bytes(whole)
    sound, told = read(jsonl(path), 1), 0
    for offset in range(len(whole)):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        try:
            assert read(jsonl(path), 1) == sound  # an unused bit, or another way to pack the same bytes
        except DataError:
            told += 1
    assert told > len(whole) * 0.9


def test_an_empty_file_is_no_packed_one(tmp_path: Path) -> None:
    for kind in ("gz", "zst"):
        path = tmp_path / f"a.jsonl.{kind}"
        path.write_bytes(b"")
        with pytest.raises(DataError, match=rf"a\.jsonl\.{kind}: is empty or not packed with (gzip|zstd), as its name"):
            read(jsonl(path, on_bad_record="drop"), 1)
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(jsonl(tmp_path / "a.jsonl"), 1) == []


def test_a_damaged_text_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"text" * 1000)[:-5])
    with pytest.raises(DataError, match=r"a\.txt\.gz: damaged after \d+ unpacked bytes"):
        read(TextSource(kind="text", domain="d", files=(str(path),), on_bad_record="drop"), 1)


# files


def test_globs_are_sorted_and_take_a_file_once(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    source = jsonl(tmp_path / "**/*.jsonl", tmp_path / "b.jsonl")
    assert texts(read(source, 100)) == ["a", "b", "sub/c"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input '.*none-\*\.jsonl' \(source of domain 'd'\) names no file, seen from"):
        jsonl(tmp_path / "none-*.jsonl").parts(100)


# text


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


# parquet


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS, "at": [f"u{i}" for i in range(50)]}), path, row_group_size=7)
    source = ParquetSource(kind="parquet", domain="d", files=(str(path),))
    expected = [(text, f"{path}#row={i}") for i, text in enumerate(TEXTS)]
    assert len(source.parts(1)) == 8
    assert read(source, 1) == read(source, 1000) == read(source, 1 << 30) == expected
    assert read(source.model_copy(update={"url_column": "at"}), 1)[20] == (TEXTS[20], "u20")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'body'; its columns: text, at\. Set text_column"):
        source.model_copy(update={"text_column": "body"}).parts(1)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    source = ParquetSource(kind="parquet", domain="d", files=(str(path),))
    pq.write_table(pa.table({"text": ["a", "b", None]}), path, row_group_size=2)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: field 'text' holds NoneType, not a string"):
        read(source, 1)
    assert texts(read(source.model_copy(update={"on_bad_record": "drop"}), 1)) == ["a", "b", "(text is no string)"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet can't be read as parquet"):
        read(source, 1)


def test_parquet_columns_are_kept_as_json_can_hold_them(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    day = datetime.date(2020, 2, 29)
    rows = pa.table({"text": ["a"], "day": [day], "raw": [b"x\xff"], "tags": [[{"d": day}]], "n": [0.5]})
    pq.write_table(rows, path)
    source = ParquetSource(kind="parquet", domain="d", files=(str(path),))
    kept = source.model_copy(update={"metadata_columns": ("day", "raw", "tags", "n")})
    expected = {"day": "2020-02-29", "raw": "x\\xff", "tags": [{"d": "2020-02-29"}], "n": 0.5}
    assert [metadata(source), metadata(kept)] == [[None], [expected]]
    with pytest.raises(UserError, match=r"has no column 'dya'; its columns: text, day, .* metadata_columns"):
        source.model_copy(update={"metadata_columns": ("dya",)}).parts(1)
    remote = source.model_copy(update={"files": ("https://example.org/{a,b}.parquet",)})
    with pytest.raises(
        UserError, match=r"'https://example\.org/a\.parquet' .*: kind `parquet` reads files of this machine"
    ):
        remote.parts(1)


# stdlib


def test_stdlib_code_is_a_sorted_prefix_without_tests() -> None:
    source = StdlibSource(kind="stdlib", part="code", domain="code", limit_bytes=300_000)
    documents = read(source, 50_000)
    urls = [url for _, url in documents]
    assert 50_000 < sum(len(text.encode()) for text in texts(documents)) <= 300_000
    assert "stdlib:__future__.py" in urls
    assert not [url for url in urls if "test" in url.split("/")]
    assert documents == read(source, 1) == read(source, 1 << 30)
    longer = source.model_copy(update={"limit_bytes": 600_000})
    assert read(longer, 1 << 30)[: len(documents)] == documents
    with pytest.raises(UserError, match=r"has no module of at most 10 bytes\. Raise limit_bytes"):
        source.model_copy(update={"limit_bytes": 10}).parts(1)


def test_stdlib_docs_are_topics_and_long_docstrings() -> None:
    source = StdlibSource(kind="stdlib", part="docs", domain="docs", limit_bytes=300_000)
    documents = read(source, 50_000)
    by_url = {url: text for text, url in documents}
    assert by_url["pydoc:topics/assert"].lstrip().startswith('The "assert" statement')
    future = by_url["stdlib:__future__.py:1"]
    assert future.startswith("Record of phased-in incompatible language changes.")
    assert all(len(text) > 80 for text, url in documents if url.startswith("stdlib:"))
    assert documents == read(source, 1 << 30)


def test_a_module_that_is_no_python_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text('"""' + "a" * 100 + '"""')
    (tmp_path / "b.py").write_text("def (:")
    (tmp_path / "c.py").write_bytes(b"# coding: no-such-codec")
    monkeypatch.setattr("data_pipeline.sources.stdlib._library", lambda: tmp_path)
    source = StdlibSource(kind="stdlib", part="code", domain="code", on_bad_record="drop")
    assert [url for _, url in read(source, 1)] == ["stdlib:a.py", "stdlib:b.py", "stdlib:c.py"]
    assert texts(read(source, 1))[2] == "(no Python source)"
    docs = source.model_copy(update={"part": "docs"})
    assert texts(read(docs, 1))[-3:] == ["a" * 100, "(no Python source)", "(no Python source)"]
    with pytest.raises(DataError, match=r"b\.py: no Python source \(invalid syntax"):
        read(docs.model_copy(update={"on_bad_record": "stop"}), 1)


# datasets


def test_datasets_streams_local_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": t} for t in TEXTS[i::3]]) for i in range(3)]
    source = DatasetsSource(
        kind="datasets", domain="d", path="json", data_files=tuple(str(path) for path in files), split="train"
    )
    assert len(source.parts(1)) == 3
    documents = read(source, 1)
    assert texts(documents) == [text for i in range(3) for text in TEXTS[i::3]]
    assert documents[0][1] == "json/train/0#row=0"
    before = source.stamp()
    assert source.stamp() == before
    write_jsonl(files[1], [{"text": "changed"}])
    assert source.stamp() != before
    with pytest.raises(DataError, match=r"json \(train\), shard 0: has no column 'body'; its columns: text"):
        read(source.model_copy(update={"text_field": "body"}), 1)
    files[2].write_text('{"text": null}\n')
    with pytest.raises(DataError, match=r"json \(train\), shard 2, row 0: field 'text' holds NoneType, not a string"):
        read(source, 1)
    files[2].write_text('{"text": null, "n": 1}\n{"text": "b", "n": 2}\n')
    dropping = source.model_copy(update={"on_bad_record": "drop", "data_files": (str(files[2]),)})
    assert texts(read(dropping, 1)) == ["(text is no string)", "b"]
    assert metadata(dropping.model_copy(update={"metadata_fields": ("n",)})) == ["rejected", {"n": 2}]
    with pytest.raises(
        DataError, match=r"has no column 'm'; its columns: text, n\. Set text_field, url_field or metadata"
    ):
        read(dropping.model_copy(update={"metadata_fields": ("m",)}), 1)


def test_a_datasets_name_that_does_not_exist_is_explained(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    source = DatasetsSource(kind="datasets", domain="d", path=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"data set '.*nothing' can't be opened"):
        source.parts(1)


def test_without_the_library_datasets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets library: pip install headrace\[hf\]"):
        DatasetsSource(kind="datasets", domain="d", path="json").parts(1)


# settings


def test_an_unknown_kind_or_key_is_refused() -> None:
    def build(**source: object) -> None:
        sources = {"s": {"domain": "d", **source}}
        build_settings(PrepareSettings, {"output": "x", "tokenizer": {"path": "t"}, "sources": sources}, "a.yaml")

    with pytest.raises(UserError, match=r"a\.yaml: unknown kind 'csv' of 'sources\.s'"):
        build(kind="csv")
    with pytest.raises(UserError, match=r"unknown key 'sources\.s\.text_feld' .*did you mean 'text_field'"):
        build(kind="jsonl", files=["a"], text_feld="b")
    with pytest.raises(UserError, match=r"'sources\.s\.domain' = 'a b'"):
        build(kind="jsonl", files=["a"], domain="a b")
