from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard
from pydantic import TypeAdapter

from data_pipeline.errors import DataError
from data_pipeline.sources import AnySource, TextSource, WebDatasetSource
from tests.data_pipeline.read_sources import TEXTS, jsonl, read, texts
from tests.http_server import HttpServer

if TYPE_CHECKING:
    from typing_extensions import Buffer


def test_a_cut_gzip_file_is_named(tmp_path: Path) -> None:
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "good"}\n' * 1000)[:-30])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: damaged after \d+ unpacked bytes"):
        read(jsonl(packed), 100)


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
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: (damaged after \d+ unpacked|is empty|is not packed)"):
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
        with pytest.raises(DataError, match=rf"a\.jsonl\.{kind}: is empty \(0 bytes\)\. Fetch it again, or take"):
            read(jsonl(path, on_bad_record="drop"), 1)
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert read(jsonl(tmp_path / "a.jsonl"), 1) == []


def test_a_damaged_text_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"text" * 1000)[:-5])
    with pytest.raises(DataError, match=r"a\.txt\.gz: damaged after \d+ unpacked bytes"):
        read(TextSource(kind="text", domain="d", files=(str(path),), on_bad_record="drop"), 1)


def test_gzip_of_several_members_and_what_may_follow_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    member = gzip.compress(b'{"text": "one"}\n')
    path.write_bytes(member + member + bytes(700))
    assert texts(read(jsonl(path), 1)) == ["one", "one"]
    for rest in (b"junk", member[:5], member[:-1]):
        path.write_bytes(member + rest)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged after \d+ unpacked bytes"):
            read(jsonl(path), 1)


@pytest.mark.parametrize("exponent", [17, 18, 21])
def test_zstd_of_a_long_window_is_read(tmp_path: Path, exponent: int) -> None:
    """`zstd --long=31` writes windows of 2 GiB, and many corpora are packed so; RFC 8878, 3.1.1.1.2: 2^(10 + exponent).
    The frame is made by hand: one raw block."""
    line = b'{"text": "one"}\n'
    path = tmp_path / "a.jsonl.zst"
    header = b"\x28\xb5\x2f\xfd\x00" + bytes([exponent << 3])
    path.write_bytes(header + (len(line) << 3 | 1).to_bytes(3, "little") + line)
    assert texts(read(jsonl(path), 1)) == ["one"]


def test_names_in_capitals_are_packed_too(tmp_path: Path) -> None:
    path = tmp_path / "A.JSONL.GZ"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert texts(read(jsonl(path), 1)) == ["one"]
    assert len(jsonl(path).parts(1)) == 1


@pytest.mark.parametrize(("pack", "advice"), [(gzip.compress, "gz"), (zstandard.compress, "zst")])
def test_a_packed_file_whose_name_hides_it_is_an_error_and_no_bad_record(
    tmp_path: Path, pack: Callable[[bytes], bytes], advice: str
) -> None:
    """As one bad record it could be dropped, with all that it holds."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack(b'{"text": "one"}\n' * 100))
    with pytest.raises(DataError, match=rf"a\.jsonl: is packed with \w+, and its name does not .* in \.{advice}"):
        read(jsonl(path, on_bad_record="drop"), 1)


@pytest.mark.parametrize(
    ("pack", "name"),
    [(lzma.compress, "xz"), (bz2.compress, "bzip2"), (lambda content: b"PK\x03\x04" + content, "zip")],
)
def test_a_packing_that_is_not_read_is_an_error_and_no_bad_record(
    tmp_path: Path, pack: Callable[[bytes], bytes], name: str
) -> None:
    """Its few broken lines could be dropped, with all that the file holds."""
    path = tmp_path / "a.jsonl.packed"
    path.write_bytes(pack(b'{"text": "one"}\n' * 100))
    told = rf"a\.jsonl\.packed: is packed with {name}, which is not read\. Pack it with zstd or gzip"
    for source in (jsonl(path), TextSource(kind="text", domain="d", files=(str(path),))):
        with pytest.raises(DataError, match=told):
            read(source.model_copy(update={"on_bad_record": "drop"}), 1)
    with pytest.raises(DataError, match=told):
        read(WebDatasetSource(kind="webdataset", domain="d", files=(str(path),)), 1)


def test_a_disk_that_fails_while_reading_is_said_of_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 100_000)

    class Failing(io.FileIO):
        def readinto(self, buffer: Buffer, /) -> int | None:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().readinto(buffer)

    monkeypatch.setattr("data_pipeline.sources.inputs.io.FileIO", Failing)
    with pytest.raises(DataError, match=r"input .*a\.jsonl can't be read to its end: Input/output error\. Look after"):
        read(jsonl(path, on_bad_record="drop"), 1 << 30)


def tar_of(name: str, payload: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(payload)
        archive.addfile(member, io.BytesIO(payload))
    return content.getvalue()


def plain_gzip(content: bytes) -> bytes:
    """As it is, so that a bit that turns in it turns in the content."""
    return gzip.compress(content, compresslevel=0)


def plain_zstd(content: bytes, checksum: bool = True) -> bytes:
    packed = zstandard.ZstdCompressor(write_checksum=checksum).compress(content)
    assert content in packed, "too long: it was compressed"
    return packed


SEPARATED = {"kind": "text", "separator": "--"}
BAD_RECORDS = {
    "a.jsonl.gz": ({"kind": "jsonl"}, b'{"text": "one"}\n{"text": "two"}\n', b'{"text": "one}\n', plain_gzip),
    "a.jsonl.zst": ({"kind": "jsonl"}, b'{"text": "one"}\n', b'{"text" "one"}\n', plain_zstd),
    "b.jsonl.gz": ({"kind": "jsonl"}, b'{"text": "one"}\nx\n{"text": "two"}\n', b"\n\n{}\n", plain_gzip),
    "a.txt.gz": (SEPARATED, b"one\n--\ntwo\n--\n", b"one\n--\n\xff\n--\n", plain_gzip),
    "a.tar.gz": ({"kind": "webdataset"}, tar_of("a.json", b'{"text": "one"}'), tar_of("a.json", b"{"), plain_gzip),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_turned_bit_in_a_packed_file_is_no_bad_record(tmp_path: Path, name: str) -> None:
    """The checksum at the end decides whose fault a record is that can't be read."""
    settings, content, bad, pack = BAD_RECORDS[name]
    path = tmp_path / name
    source = TypeAdapter(AnySource).validate_python({**settings, "domain": "d", "files": (str(path),)})
    whole, found = pack(content), 0
    text = whole.index(b"one")
    for place in range(max(text - 10, whole.index(content[:3])), text + 5):
        for bit in (1, 128):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            with pytest.raises(DataError) as told:
                read(source, 1 << 20)
            assert "drop" not in str(told.value), (place, bit)
            found += "CRC check failed" in str(told.value) or "checksum" in str(told.value)
    assert found >= 10
    path.write_bytes(pack(bad))
    with pytest.raises(
        DataError, match=r"The file was packed like that: its own checksum fits\. Or set `on_bad_record: d"
    ):
        read(source, 1 << 20)


def test_zstd_without_a_checksum_is_told_and_no_proof(tmp_path: Path) -> None:
    whole, unchecked = tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl.zst"
    whole.write_bytes(SKIPPABLE + plain_zstd(b'{"text": "one"}\n'))
    (tmp_path / "c.jsonl.zst").write_bytes(b"(\xb5/")  # cut off: no doubt, but an error
    assert list(jsonl(whole, tmp_path / "c.jsonl.zst").doubts()) == []
    unchecked.write_bytes(SKIPPABLE + plain_zstd(b'{"text": one"}\n', checksum=False))
    (doubt,) = jsonl(whole, unchecked).doubts()
    assert doubt.startswith(
        f"1 of its files are packed without a checksum (the first: {unchecked}), so that a turned bit"
    )
    with pytest.raises(DataError, match=r"Mend or remove the record\. Or set"):
        read(jsonl(unchecked), 1)


def test_remote_packed_files_are_read_to_their_end_and_commands_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = plain_gzip(b'{"text": "one"}\nx\n' + b'{"text": "two"}\n' * 9)
    path.write_bytes(whole)
    with HttpServer(tmp_path) as server:
        remote = jsonl(Path("x")).model_copy(update={"files": (f"{server.url}/a.jsonl.gz",)})
        with pytest.raises(DataError, match=r"a\.jsonl\.gz, byte 16: not valid JSON .* its own checksum fits\. Or set"):
            read(remote, 1)
        path.write_bytes(whole.replace(b"two", b"tvo", 1))
        with pytest.raises(DataError, match=r"a\.jsonl\.gz: damaged after \d+ unpacked bytes \(CRC check failed"):
            read(remote, 1)
    command = jsonl(Path("x")).model_copy(update={"files": (f"pipe:zcat {path} 2>/dev/null; true {path}",)})
    with pytest.raises(DataError, match=r"byte 16: not valid JSON .* Mend or remove the record\. Or set"):
        read(command, 1)


def test_what_follows_a_dropped_record_of_a_packed_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\nx\n{"text": "two"}\n'))
    assert texts(read(jsonl(path, on_bad_record="drop"), 1)) == ["one", "(not JSON)", "two"]
