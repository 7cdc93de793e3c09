from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError, UserError
from data_pipeline.prepare import PrepareSettings
from data_pipeline.settings import build_settings
from data_pipeline.sources import DatasetsSource, JsonlSource, ParquetSource, Source, StdlibSource, TextSource

TEXTS = [f"text {i} " + "\u00e9x" * (i * 7 % 40) + "\n" * (i % 3) for i in range(50)]


def read(source: Source, part_bytes: int) -> list[tuple[str, str]]:
    parts = source.parts(part_bytes)
    return [(document.text, document.url) for part in parts for document in source.read(part)]


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
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet can't be read as parquet"):
        read(source, 1)


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

    with pytest.raises(UserError, match=r"a\.yaml: .*sources\.s.*'csv'.*'jsonl'"):
        build(kind="csv")
    with pytest.raises(UserError, match=r"unknown key 'sources\.s\.jsonl\.text_feld' .*did you mean 'text_field'"):
        build(kind="jsonl", files=["a"], text_feld="b")
    with pytest.raises(UserError, match=r"'sources\.s\.jsonl\.domain' = 'a b'"):
        build(kind="jsonl", files=["a"], domain="a b")
