from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import webdataset as wds
import zstandard
from pydantic import ValidationError

from data_pipeline.errors import DataError, UserError
from data_pipeline.sources import Document, Rejected, WebDatasetSource

Files = Sequence[tuple[str, bytes]]


def write_tar(path: Path, files: Files) -> Path:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    content = target.getvalue()
    if path.suffix in (".gz", ".tgz"):
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def source(*files: Path | str, **options: object) -> WebDatasetSource:
    return WebDatasetSource.model_validate(
        {"kind": "webdataset", "domain": "d", "files": tuple(str(path) for path in files), **options}
    )


def read(source: WebDatasetSource) -> list[Document | Rejected]:
    return [record for part in source.parts(1) for record in source.read(part)]


def texts(records: Iterable[Document | Rejected]) -> list[str]:
    return [record.text if isinstance(record, Document) else f"({record.reason})" for record in records]


def packed(value: object) -> bytes:
    return gzip.compress(json.dumps(value).encode())


def test_text_fields_and_what_stands_beside_them(tmp_path: Path) -> None:
    meta = {"licence": "cc0", "score": 0.5}
    plain = write_tar(
        tmp_path / "txt.tar",
        [
            ("x/a.txt", "été".encode()),
            ("x/a.json", json.dumps(meta).encode()),
            ("x/a.cls", b"7"),
            ("x/a.jpg", b"\xff\xd8"),
        ],
    )
    assert read(source(plain, text_extension="txt")) == [
        Document("été", f"{plain}#x/a", {"json": meta, "cls": "7"})  # the picture is no text
    ]
    for extension, content in (
        ("json", json.dumps({"text": "t", **meta}).encode()),
        ("json.gz", packed({"text": "t", **meta})),
    ):
        path = write_tar(tmp_path / f"{extension}.tar", [(f"a.{extension}", content), ("a.cls", b"7")])
        assert read(source(path)) == [Document("t", f"{path}#a", {"cls": "7", extension: meta})]
        assert read(source(path, text_field="licence", url_field="text", metadata_fields=())) == [
            Document("cc0", "t", {extension: {"score": 0.5}})
        ]
    only = write_tar(tmp_path / "only.tar", [("a.txt", b"t"), ("b.txt", b"u")])
    assert read(source(only)) == [Document("t", f"{only}#a"), Document("u", f"{only}#b")]


def test_which_field_is_the_text_is_said_where_several_could_be(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [("a.txt", b"t"), ("a.json", b'{"text": "j"}'), ("a.page.html.gz", gzip.compress(b"h"))]
    )
    with pytest.raises(
        UserError, match=r"a\.tar, byte 0, sample 'a': has the fields txt and json, of which each may be the"
    ):
        read(source(path))
    assert [texts(read(source(path, text_extension=name))) for name in ("txt", "json", "page.html.gz")] == [
        ["t"],
        ["j"],
        ["h"],
    ]
    with pytest.raises(
        DataError, match=r"has no field 'md'; its fields: json, page\.html\.gz, txt\. Set text_extension\."
    ):
        read(source(path, text_extension="md"))


def test_metadata_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    large = b"w" * 70_000
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"t"), ("a.big", large), ("a.npy", b"\x93NUMPY"), ("a.cls", b"1")])
    assert read(source(path))[0] == Document("t", f"{path}#a", {"cls": "1"})
    assert read(source(path, metadata_fields=("big",)))[0] == Document("t", f"{path}#a", {"big": large.decode()})
    assert read(source(path, metadata_fields=()))[0] == Document("t", f"{path}#a", None)
    with pytest.raises(DataError, match=r"has no field 'cl'; its fields: big, cls, npy, txt\. Set metadata_fields"):
        read(source(path, metadata_fields=("cl",)))
    assert texts(read(source(path, metadata_fields=("cl",), optional_fields=("cl",)))) == ["t"]
    with pytest.raises(DataError, match=r"field 'npy': not UTF-8"):
        read(source(path, metadata_fields=("npy",)))


BAD = [
    ("0.json", b'{"text": "zero"}'),
    ("1.json", b'{"text": "one"'),
    ("2.json", b'{"txt": "two"}'),
    ("3.json", b'{"text": 3}'),
    ("4.json", b'["four"]'),
    ("5.json", b'{"text": "\xff"}'),
    ("6.json", b'{"text": "\\ud800"}'),
    ("README", b"none"),
    ("0.json", b'{"text": "again"}'),
    ("7.txt", b"seven"),
    ("8.json", b'{"text": "eight", "k": "\\ud800"}'),
]


def test_bad_samples_are_dropped_one_by_one_and_stop_with_their_byte(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", BAD[:9] + BAD[10:])
    records = read(source(path, on_bad_record="drop"))
    assert texts(records) == [
        "zero",
        "(not JSON)",
        "(no field text)",
        "(text is no string)",
        "(no JSON object)",
        "(not UTF-8)",
        "(half a surrogate pair)",
        "(name without an extension)",
        "(key twice in an archive)",
        "eight",
    ]
    rejected = [record for record in records if isinstance(record, Rejected)]
    assert [record.url for record in rejected[:2]] == [f"{path}#1", f"{path}#2"]
    for number, record in enumerate(rejected, 1):
        assert record.message.startswith(f"{path}, byte {1024 * number}"), record.message
    with pytest.raises(
        DataError, match=r"a\.tar, byte 1024, sample '1', field 'json': not valid JSON .* `on_bad_record: drop`\."
    ):
        read(source(path))


def test_a_damaged_archive_is_an_error_even_where_bad_records_are_dropped(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", BAD[:9])
    path.write_bytes(path.read_bytes()[: 3 * 1024])
    with pytest.raises(DataError, match=r"a\.tar, byte 3072: the archive is cut off"):
        read(source(path, on_bad_record="drop"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst", "gz-by-its-content.tar"])
def test_packed_archives_and_names_as_plain_webdataset_reads_them(tmp_path: Path, name: str) -> None:
    files = [(f"./d{i % 3}/s{i}.{'TXT' if i % 2 else 'txt'}", f"{i}".encode()) for i in range(20)]
    path = write_tar(tmp_path / name, files)
    if name.startswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    ours = [(record.url, record.text) for record in read(source(path)) if isinstance(record, Document)]
    if name.endswith(".zst"):
        subprocess.run(["zstd", "-q", "-d", path, "-o", tmp_path / "b.tar"], check=True)
    plain = wds.WebDataset([str(tmp_path / "b.tar" if name.endswith(".zst") else path)], shardshuffle=False)
    assert ours == [(f"{path}#{sample['__key__']}", sample["txt"].decode()) for sample in plain]
    assert [text for _, text in ours] == [str(i) for i in range(20)]


def test_brace_patterns_and_globs(tmp_path: Path) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number:03d}.tar", [("a.txt", f"{number}".encode())])
    write_tar(tmp_path / "x{1,2}.tar", [("a.txt", b"braces")])
    assert texts(read(source(tmp_path / "{000..011}.tar"))) == [str(number) for number in range(12)]
    assert texts(read(source(tmp_path / "{011,00{3,4}}.tar", tmp_path / "00?.tar"))) == [*map(str, range(10)), "11"]
    assert texts(read(source(tmp_path / "x{1,2}.tar"))) == ["braces"]
    with pytest.raises(UserError, match=r"input '.*012\.tar' \(source of domain 'd'\) names no file"):
        read(source(tmp_path / "{000..012}.tar"))
    with pytest.raises(UserError, match=r"input '.*\{000\.\.011\.tar' .*: Unbalanced braces"):
        read(source(f"{tmp_path}/{{000..011.tar"))


def test_one_part_a_tar_and_a_stamp_that_sees_changes(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"{i}.tar", [("a.txt", b"x")]) for i in range(3)]
    ours = source(*paths)
    assert [[span.path for span in part.spans] for part in ours.parts(1 << 30)] == [[str(path)] for path in paths]
    assert [part.bytes for part in ours.parts(1)] == [path.stat().st_size for path in paths]
    before = ours.stamp()
    assert before == ours.stamp()
    write_tar(paths[1], [("a.txt", b"y" * 20_000)])
    assert {path for path, stamp in ours.stamp().items() if stamp != before[path]} == {str(paths[1])}


def test_names_that_are_not_utf8_make_urls_that_are(tmp_path: Path) -> None:
    name = tmp_path / "caf\udce9.tar"  # Latin-1 on the disk
    write_tar(name, [("a.txt", b"x"), ("\udce9.txt", b"\xff")])
    document, rejected = read(source(name, on_bad_record="drop"))
    assert isinstance(document, Document)
    assert isinstance(rejected, Rejected)
    assert document.url == f"{tmp_path}/caf\\udce9.tar#a"
    assert rejected.url == f"{tmp_path}/caf\\udce9.tar#\\udce9"
    assert "sample '\\udce9'" in rejected.message
    json.dumps(source(name).stamp(), ensure_ascii=False).encode()


def test_a_byte_order_mark_at_the_beginning_of_a_member_is_no_text(tmp_path: Path) -> None:
    members = [("a.txt", codecs.BOM_UTF8 + b"one"), ("a.json", codecs.BOM_UTF8 + b'{"n": 1}')]
    records = read(source(write_tar(tmp_path / "a.tar", members), text_extension="txt"))
    assert records == [Document("one", f"{tmp_path}/a.tar#a", {"json": {"n": 1}})]


def test_one_key_may_be_text_and_url(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.json", b'{"text": "x", "n": 1}')])
    assert read(source(path, url_field="text")) == [Document("x", "x", {"json": {"n": 1}})]


def test_an_empty_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match=r"a\.tar: is empty \(0 bytes\)\. Fetch it again, or take it out of `files`"):
        read(source(tmp_path / "a.tar"))


@pytest.mark.parametrize("key", ["text_extension", "metadata_fields", "optional_fields"])
@pytest.mark.parametrize("name", [".md", "MD"])
def test_names_that_no_field_can_have_are_refused(key: str, name: str) -> None:
    plain = {"kind": "webdataset", "domain": "d", "files": ("a.tar",)}
    with pytest.raises(ValidationError, match=rf"no field is named '{re.escape(name)}': .* before: 'md'"):
        WebDatasetSource.model_validate({**plain, key: name if key == "text_extension" else (name,)})
