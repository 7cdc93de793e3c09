from __future__ import annotations

import datetime
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError, UserError
from data_pipeline.sources import DatasetsSource, ParquetSource
from data_pipeline.sources.records import json_ready
from tests.data_pipeline.read_sources import TEXTS, metadata, read, texts, write_jsonl


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


def test_parquet_that_is_not_utf8_is_a_bad_record(tmp_path: Path) -> None:
    """Other writers put any bytes into a string column."""
    path = tmp_path / "a.parquet"
    ends, bytes_ = np.array([0, 1, 2, 3, 4], np.int32), b"a\xffcd"
    broken = pa.Array.from_buffers(pa.string(), 4, [None, pa.py_buffer(ends), pa.py_buffer(bytes_)])
    pq.write_table(pa.table({"text": broken, "n": [1, 2, 3, 4]}), path)
    source = ParquetSource(kind="parquet", domain="d", files=(str(path),), metadata_columns=("n",))
    with pytest.raises(DataError, match=r"a\.parquet, row 1: not UTF-8 \(byte 0 of the record is 0xff\)"):
        read(source, 1)
    dropping = source.model_copy(update={"on_bad_record": "drop"})
    assert read(dropping, 1) == [(t, f"{path}#row={i}") for i, t in enumerate(["a", "(not UTF-8)", "c", "d"])]
    assert metadata(dropping) == [{"n": 1}, "rejected", {"n": 3}, {"n": 4}]


def test_parquet_of_other_string_types(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    source = ParquetSource(kind="parquet", domain="d", files=(str(path),))
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).cast(kind)}), path)
        assert texts(read(source, 1)) == ["a", "b", "a"]
    for values, told in ((pa.array([b"a"]), "bytes"), (pa.array([{"x": "a"}]), "dict"), (pa.array([["a"]]), "list")):
        pq.write_table(pa.table({"text": values}), path)
        with pytest.raises(DataError, match=rf"row 0: field 'text' holds {told}, not a string"):
            read(source, 1)


def test_an_empty_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"a\.parquet: is empty \(0 bytes\)\. Fetch it again, or take it out"):
        ParquetSource(kind="parquet", domain="d", files=(str(tmp_path / "a.parquet"),)).parts(1)


def test_a_time_that_python_has_not_is_a_bad_record(tmp_path: Path) -> None:
    """Arrow holds years beyond 9999; Python's dates overflow there."""
    path = tmp_path / "a.parquet"
    times = pa.array([1, 1 << 61, 2], pa.timestamp("us"))
    spans = pa.array([1, 1 << 61, 2], pa.duration("s"))
    pq.write_table(pa.table({"text": ["a", "b", "c"], "at": times, "for": spans}), path)
    for column in ("at", "for"):
        source = ParquetSource(kind="parquet", domain="d", files=(str(path),), metadata_columns=(column,))
        with pytest.raises(
            DataError, match=r"a\.parquet, row 1: holds a value that can't be read \(.*\)\. Mend the row"
        ):
            read(source, 1)
        dropping = source.model_copy(update={"on_bad_record": "drop"})
        assert texts(read(dropping, 1)) == ["a", "(no readable value)", "c"]
    assert texts(read(ParquetSource(kind="parquet", domain="d", files=(str(path),)), 1)) == ["a", "b", "c"]


def test_a_flipped_bit_is_seen_where_pages_have_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.table({"text": [f"word {number}" for number in range(1000)]})
    pq.write_table(rows, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"word 500") + 5] ^= 1
    path.write_bytes(content)
    source = ParquetSource(kind="parquet", domain="d", files=(str(path),), on_bad_record="drop")
    with pytest.raises(DataError, match=r"a\.parquet, after row \d+: .*checksum.*\. Fetch the file again"):
        read(source, 1 << 30)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"a\.parquet has 2 columns named 'text', of which nobody can tell"):
        ParquetSource(kind="parquet", domain="d", files=(str(path),)).parts(1)


def test_objects_without_a_text_of_their_own_are_no_metadata(tmp_path: Path) -> None:
    """The text of an image object of a library is its place in memory: another one in every process."""
    stamp = {"day": [datetime.date(2020, 2, 29), datetime.timedelta(days=1)]}
    assert json_ready(stamp, "f") == {"day": ["2020-02-29", "1 day, 0:00:00"]}
    with pytest.raises(UserError, match=r"'picture' holds object, which can't be kept beside a document\. Take it out"):
        json_ready({"a": object()}, "picture")


def test_a_time_that_python_has_not_is_told_by_datasets_too(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "at": pa.array([1, 1 << 61], pa.timestamp("us"))}), path)
    source = DatasetsSource(kind="datasets", domain="d", path="parquet", data_files=(str(path),))
    with pytest.raises(DataError, match=r"parquet \(train\), shard 0, after row 0: OverflowError"):
        read(source, 1)


def test_a_configuration_and_a_split_of_a_data_set_are_read(tmp_path: Path) -> None:
    """A folder with the card of a data set on the hub: what its `configs` name is opened by name and split."""
    pytest.importorskip("datasets")
    lines = ["---", "configs:"]
    for name in ("en", "de"):
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "validation"):
            files = [tmp_path / name / f"{split}-{number}.parquet" for number in range(2)]
            for number, path in enumerate(files):
                path.parent.mkdir(exist_ok=True)
                pq.write_table(pa.table({"text": [f"{name} {split} {number}"], "n": [number]}), path)
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*.parquet"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---"]))
    source = DatasetsSource(kind="datasets", domain="d", path=str(tmp_path), name="de", split="validation")
    assert len(source.parts(1)) == 2
    assert texts(read(source, 1)) == ["de validation 0", "de validation 1"]
    assert texts(read(source.model_copy(update={"name": "en", "split": "train"}), 1)) == ["en train 0", "en train 1"]
    assert len(source.stamp()) == 4
    for wrong in ({"name": "fr"}, {"split": "test"}):
        with pytest.raises(UserError, match=r"data set '.*' can't be opened: ValueError"):
            source.model_copy(update=wrong).parts(1)
