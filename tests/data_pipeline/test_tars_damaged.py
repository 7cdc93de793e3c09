"""Damaged archives: what plain `webdataset` makes of each, and that ours is an error that names the byte."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset as wds

from data_pipeline.errors import DataError
from data_pipeline.sources import Document, WebDatasetSource
from data_pipeline.storage import RemoteSettings, StorageSettings
from data_pipeline.tars import BadSample, Member, Sample, TarError, group_samples, walk_tar
from tests.http_server import Faults, HttpServer

SAMPLES = 100
MEMBERS = 1024  # bytes of each member: a header and one block
SAMPLE = 2 * MEMBERS
HALF = SAMPLE * SAMPLES // 2  # where sample 50 begins
END = SAMPLE * SAMPLES


def make_tar(first: int, meta: str = "json", form: int = tarfile.GNU_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for number in range(first, first + SAMPLES):
            content = json.dumps({"number": number}).encode()
            packed = gzip.compress(content, mtime=0) if meta.endswith("gz") else content
            for field, payload in (("txt", f"text of {number}".encode()), (meta, packed)):
                info = tarfile.TarInfo(f"{number:06d}.{field}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return target.getvalue()


def flipped(archive: bytes, offset: int, bits: int = 0x80) -> bytes:
    return archive[:offset] + bytes([archive[offset] ^ bits]) + archive[offset + 1 :]


def zeroed(archive: bytes, start: int, size: int = 4096) -> bytes:
    return archive[:start] + bytes(size) + archive[start + size :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], int | None, str]] = {
    # name: (the damage, samples that plain webdataset gives of 200 or None for an error, our message)
    "header checksum": (
        lambda tar: flipped(tar, HALF + 3, 1),
        150,
        rf"byte {HALF}: the checksum of the tar header here does not fit",
    ),
    "zeros over a header": (
        lambda tar: zeroed(tar, HALF),
        150,
        rf"byte {HALF}: the archive ends here, but byte {HALF + 4096} is not zero",
    ),
    "one block of zeros over a header": (
        lambda tar: zeroed(tar, HALF, 512),
        150,
        rf"byte {HALF}: one block of zeros and then more",
    ),
    "cut inside a header": (
        lambda tar: tar[: HALF + 100],
        150,
        rf"byte {HALF}: the archive is cut off: it ends 100 bytes into a header",
    ),
    "cut between two samples": (
        lambda tar: tar[:HALF],
        150,
        rf"byte {HALF}: the archive is cut off: it ends between two members, without the two zero blocks",
    ),
    "cut between two files of a sample": (
        lambda tar: tar[: HALF + MEMBERS],
        151,
        rf"byte {HALF + MEMBERS}: the archive is cut off: it ends between two members",
    ),
    "cut inside a payload": (
        lambda tar: tar[: HALF + 512 + 5],
        None,
        rf"byte {HALF + 517}: the archive is cut off: it ends inside the payload of '000050\.txt' \(10 bytes\)",
    ),
    "end of archive cut off": (
        lambda tar: tar[:END],
        200,
        rf"byte {END}: the archive is cut off: it ends between two members",
    ),
    "bit flipped in a payload": (
        lambda tar: flipped(tar, HALF + 512 + 5),
        200,
        rf"byte {HALF}, sample '000050', field 'txt': not UTF-8 \(byte 5 of the record",
    ),
    "one zero block at the end": (
        lambda tar: tar[: END + 512],
        200,
        rf"byte {END + 512}: the archive is cut off",
    ),
    "bytes lost before a header": (
        lambda tar: tar[: HALF - 100] + tar[HALF:],
        150,
        rf"byte {HALF}: the checksum of the tar header here does not fit",
    ),
    "two archives joined": (
        lambda tar: tar[: END + 1024] + make_tar(900),
        200,
        rf"byte {END}: the archive ends here, but byte {END + 1024} is not zero",
    ),
    "tail never written": (
        lambda tar: tar[:HALF] + bytes(2 << 20),
        150,
        rf"byte {HALF}: more than 1048576 bytes of zeros where the archive ends",
    ),
    "no tar": (
        lambda tar: b"<html>not found</html>" * 50,
        None,
        "byte 0: the checksum of the tar header here does not",
    ),
}


def source(*files: Path, **options: object) -> WebDatasetSource:
    return WebDatasetSource.model_validate(
        {
            "kind": "webdataset",
            "domain": "d",
            "files": tuple(str(path) for path in files),
            "text_extension": "txt",
            **options,
        }
    )


def plain_webdataset(files: list[Path]) -> list[dict[str, bytes]]:
    return list(wds.WebDataset([str(path) for path in files], shardshuffle=False))


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_what_plain_webdataset_loses_is_an_error_with_its_byte(tmp_path: Path, damage: str) -> None:
    break_it, theirs, message = DAMAGES[damage]
    files = [tmp_path / "a.tar", tmp_path / "b.tar"]
    files[0].write_bytes(break_it(make_tar(0)))
    files[1].write_bytes(make_tar(100))
    if theirs is None:
        with pytest.raises(tarfile.ReadError):
            plain_webdataset(files)
    else:
        assert len(plain_webdataset(files)) == theirs

    for on_bad_record in ("stop", "drop"):
        ours = source(*files, on_bad_record=on_bad_record)
        parts = ours.parts(1)
        if damage == "bit flipped in a payload" and on_bad_record == "drop":
            records = list(ours.read(parts[0]))
            assert [number for number, record in enumerate(records) if not isinstance(record, Document)] == [50]
            assert len(records) == 100
        else:
            with pytest.raises(DataError, match=re.escape(str(files[0])) + ", " + message):
                list(ours.read(parts[0]))
        assert len(list(ours.read(parts[1]))) == 100


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", ["http", "http without ranges", "pipe"])
def test_damage_is_the_same_error_on_every_way(tmp_path: Path, way: str, packed: bool) -> None:
    """An answer or a command that is complete is no reason to take what it brings for whole."""
    storage = StorageSettings(remote=RemoteSettings(attempts=2, first_backoff_seconds=0, range_bytes=40_000))
    with HttpServer(tmp_path, Faults(ranges=way == "http")) as server:
        for number, (damage, (break_it, _, message)) in enumerate(DAMAGES.items()):
            path = tmp_path / (f"{number}.tar.gz" if packed else f"{number}.tar")
            archive = break_it(make_tar(0))
            path.write_bytes(gzip.compress(archive, 1) if packed else archive)
            name = f"pipe:cat {path}" if way == "pipe" else f"{server.url}/{path.name}"
            for on_bad_record in ("stop", "drop"):
                ours = WebDatasetSource(
                    kind="webdataset", domain="d", files=(name,), text_extension="txt", on_bad_record=on_bad_record
                )
                records = ours.read(ours.parts(1, storage)[0], storage)
                if damage == "bit flipped in a payload" and on_bad_record == "drop":
                    kept = [isinstance(record, Document) for record in records]
                    assert (len(kept), kept.index(False), sum(kept)) == (100, 50, 99)
                else:
                    with pytest.raises(DataError, match=re.escape(name) + ", " + message):
                        list(records)


def test_a_flip_in_a_payload_is_noticed_only_where_something_checks_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(flipped(make_tar(0), HALF + 512 + 5, 1))  # still UTF-8
    read = [record.text for record in source(path).read(source(path).parts(1)[0]) if isinstance(record, Document)]
    assert read == [f"text of {number}" if number != 50 else "text nf 50" for number in range(100)]

    packed = make_tar(0, "json.gz")
    payload = HALF + MEMBERS + 512
    for offset in range(payload + 10, payload + len(gzip.compress(b'{"number": 50}', mtime=0))):
        path.write_bytes(flipped(packed, offset, 1 << offset % 8))
        records = list(source(path, on_bad_record="drop").read(source(path).parts(1)[0]))
        assert [(n, r.reason) for n, r in enumerate(records) if not isinstance(r, Document)] == [(50, "damaged gzip")]


def test_a_packed_archive_that_is_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    packed = gzip.compress(make_tar(0), 1)
    path = tmp_path / "a.tar.gz"
    for cut in range(0, len(packed), len(packed) // 37):
        path.write_bytes(packed[:cut])
        with pytest.raises(DataError, match=r"a\.tar\.gz"):
            list(source(path).read(source(path).parts(1)[0]))
    path.write_bytes(packed)
    sound = list(source(path).read(source(path).parts(1)[0]))
    draw = random.Random(0)
    told = 0
    for _ in range(20):
        path.write_bytes(flipped(packed, draw.randrange(10, len(packed)), 4))
        try:
            assert list(source(path).read(source(path).parts(1)[0])) == sound  # another way to pack the same bytes
        except DataError:
            told += 1
    assert told > 10


# every byte


def small_tar(form: int) -> bytes:
    """Three samples, among them names too long for a plain header."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form, pax_headers={"comment": "c"}) as tar:
        for key in ("a", "long" * 30, "z"):
            for field in ("txt", "cls"):
                info = tarfile.TarInfo(f"{key}.{field}")
                info.size, info.mtime = 5, 1.5
                tar.addfile(info, io.BytesIO(b"x" * 5))
    return target.getvalue()


def members(archive: bytes) -> list[Member]:
    return list(walk_tar(io.BytesIO(archive), "a.tar"))


def samples(archive: bytes) -> list[Sample | BadSample]:
    return list(group_samples(walk_tar(io.BytesIO(archive), "a.tar"), "a.tar"))


@pytest.fixture(params=[tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def archive(request: pytest.FixtureRequest) -> bytes:
    return small_tar(request.param)


def header_blocks(archive: bytes) -> list[int]:
    """Where header blocks stand: each member's, and those of long names and pax records before it."""
    blocks = []
    position = 0
    while archive[position] != 0:
        blocks.append(position)
        position += (
            512 + -(-tarfile.TarInfo.frombuf(archive[position : position + 512], "utf-8", "strict").size // 512) * 512
        )
    return blocks


def shown(found: list[Member]) -> list[tuple[str, int, int]]:
    return [(member.name, member.offset, member.size) for member in found]


def test_a_flip_in_any_header_byte_is_an_error_or_changes_nothing(archive: bytes) -> None:
    sound = shown(members(archive))
    draw = random.Random(0)
    passed: set[int] = set()
    told: list[int] = []
    for block in header_blocks(archive):
        for byte in range(512):
            try:
                found = shown(members(flipped(archive, block + byte, draw.randrange(1, 256))))
            except TarError as error:
                told.append(block - error.offset)
            else:
                assert found == sound
                passed.add(byte)
    assert set(told) == {0}
    assert passed <= set(range(148, 156))  # the checksum field itself: a zero for a space before its digits


def test_a_flip_in_any_byte_never_loses_or_merges_samples(archive: bytes) -> None:
    """Names in extension headers have no checksum: one that changes is an error, or a bad or renamed sample."""
    draw = random.Random(1)
    for offset in range(len(archive[:-1024].rstrip(b"\0")) + 600):
        try:
            found = samples(flipped(archive, offset, 1 << draw.randrange(8)))
        except TarError:
            continue
        sound = [sample for sample in found if isinstance(sample, Sample)]
        assert all(set(sample.names) == {"txt", "cls"} for sample in sound)
        assert len(sound) == 3 or len(found) > len(sound)


def test_a_cut_anywhere_is_an_error_until_the_end_is_whole(archive: bytes) -> None:
    sound = shown(members(archive))
    end = len(archive.rstrip(b"\0")) + 507  # the last payload's 5 bytes begin its block
    assert archive[end - 1024 : end - 1019] == b"x" * 5 or archive[end - 512 : end - 507] == b"x" * 5
    for cut in range(end + 1024):
        with pytest.raises(TarError, match=r"a\.tar, byte \d+: .*(cut off|Fetch or write)"):
            members(archive[:cut])
    for cut in (end + 1024, end + 1025, len(archive)):
        assert shown(members(archive[:cut])) == sound


def test_zeros_over_any_blocks_before_the_last_member_are_an_error_or_fill_a_payload(archive: bytes) -> None:
    sound = shown(members(archive))
    headers = set(header_blocks(archive))
    last = sound[-1][1]
    for start in range(0, last, 512):
        for stop in range(start + 512, last + 1, 512):
            broken = zeroed(archive, start, stop - start)
            if headers.intersection(range(start, stop, 512)):
                with pytest.raises(TarError, match=r"a\.tar, byte \d+: "):
                    members(broken)


def test_an_error_travels_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(TarError("a.tar", 512, "broken")))
    assert (str(error), error.where, error.offset) == ("a.tar, byte 512: broken", "a.tar", 512)
