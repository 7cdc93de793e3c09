"""The walker against Python's tarfile and GNU tar on sound archives, and on every form of header."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tars import BadSample, Sample, TarError, group_samples, split_name, walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.LNKTYPE: "hard link",
    tarfile.FIFOTYPE: "special file",
}

Row = tuple[str, str, str, int, int, bytes]


def ours(archive: bytes) -> list[Row]:
    """(name, kind, link, offset, size, payload) as the walker gives them."""
    return [
        (member.name, member.kind, member.link, member.offset, member.size, member.read())
        for member in walk_tar(io.BytesIO(archive), "a.tar")
    ]


def tarfiles(archive: bytes) -> list[Row]:
    """The same as Python's tarfile reads them."""
    rows: list[Row] = []
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for info in tar:
            file = tar.extractfile(info) if info.isreg() else None
            payload = file.read() if file else b""
            rows.append((info.name, KINDS[info.type], info.linkname, info.offset, len(payload), payload))
    return rows


def make_tar(files: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return target.getvalue()


def with_field(archive: bytes, header: int, start: int, content: bytes) -> bytes:
    """``archive`` with a field of the header at byte ``header`` replaced, and its checksum made to fit."""
    block = bytearray(archive[header : header + 512])
    block[start : start + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return archive[:header] + bytes(block) + archive[header + 512 :]


NAME = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=130)
PATHS = st.lists(NAME, min_size=1, max_size=3).map("/".join).filter(lambda name: not name.endswith("/"))


@pytest.mark.parametrize("form", list(FORMATS))
@settings(max_examples=60, deadline=None)
@given(files=st.lists(st.tuples(PATHS, st.integers(0, 1600)), max_size=6), folder=st.booleans())
def test_archives_written_by_tarfile_are_read_as_tarfile_reads_them(
    form: str, files: list[tuple[str, int]], folder: bool
) -> None:
    target = io.BytesIO()
    written = 0
    with tarfile.open(fileobj=target, mode="w", format=FORMATS[form]) as tar:
        for number, (name, size) in enumerate(files):
            info = tarfile.TarInfo(name)
            if folder and number % 3 == 1:
                info.type = tarfile.DIRTYPE
            elif folder and number % 3 == 2:
                info.type, info.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE)[number % 2], f"{name}-to"
            else:
                info.size = size
            info.mtime, info.uid = 3.25 * number, 1 << 40 if form == "gnu" else 7
            try:
                tar.addfile(info, io.BytesIO(os.urandom(info.size)))
            except ValueError:  # too long for USTAR
                continue
            written += 1
    rows = ours(target.getvalue())
    assert len(rows) == written
    assert rows == tarfiles(target.getvalue())


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_written_by_gnu_tar_are_read_as_tarfile_reads_them(tmp_path: Path, form: str) -> None:
    names = ["a.txt", "sub/b.json", "sub/" + "n" * 90 + ".txt", "empty.cls", "é ü.txt"]
    if form not in ("v7", "ustar"):
        names += ["sub/" + "m" * 200 + ".txt", "deep/" * 40 + "x.txt"]
    elif form == "ustar":
        names += ["deep/" * 30 + "x.txt"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if "empty" in name else os.urandom(400 * number))
    os.symlink("a.txt", tmp_path / "link.txt")
    os.link(tmp_path / "a.txt", tmp_path / "twin.txt")
    tops = sorted(os.listdir(tmp_path))
    archive = subprocess.run(
        ["tar", f"--format={form}", "-cf", "-", *tops], cwd=tmp_path, check=True, capture_output=True
    ).stdout
    rows = ours(archive)
    assert rows == tarfiles(archive)
    assert {name: payload for name, kind, *_, payload in rows if kind == "file"} == {
        name: (tmp_path / name).read_bytes() for name in names
    }
    assert {(name, kind, link) for name, kind, link, *_ in rows if "link" in kind} == {
        ("link.txt", "symbolic link", "a.txt"),
        ("twin.txt", "hard link", "a.txt"),
    }


def test_numbers_in_base_256_and_sizes_of_pax_records() -> None:
    archive = make_tar([("a.txt", b"x" * 700), ("b.txt", b"y" * 20)])
    binary = with_field(archive, 0, 124, b"\x80" + (700).to_bytes(11, "big"))
    assert ours(binary) == tarfiles(binary) == ours(archive)

    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c"}) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 700, {"size": "700", "path": "renamed.txt"}
        tar.addfile(info, io.BytesIO(b"x" * 700))
    archive = target.getvalue()  # global header and payload, pax header and payload, header
    assert archive[4 * 512 :].startswith(b"a.txt\0")
    unsized = with_field(archive, 4 * 512, 124, b"%011o\0" % 0)
    assert ours(unsized) == tarfiles(unsized) == [("renamed.txt", "file", "", 1024, 700, b"x" * 700)]


def test_global_pax_records_hold_until_a_member_says_otherwise() -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "all.txt"}) as tar:
        for name in ("a.txt", "é.txt", "b.txt"):  # only the second has a pax header of its own
            tar.addfile(tarfile.TarInfo(name))
    assert [row[0] for row in ours(target.getvalue())] == ["all.txt", "é.txt", "all.txt"]
    assert ours(target.getvalue()) == tarfiles(target.getvalue())


def test_a_folder_of_the_oldest_form_is_known_by_its_slash() -> None:
    archive = with_field(with_field(make_tar([("d/", b""), ("d/a.txt", b"x")]), 0, 156, b"\0"), 512, 156, b"\0")
    assert [row[:2] for row in ours(archive)] == [("d", "folder"), ("d/a.txt", "file")]
    assert ours(archive) == tarfiles(archive)


def test_the_front_of_a_name_counts_only_in_posix_headers() -> None:
    archive = with_field(make_tar([("a.txt", b"x")]), 0, 345, b"14760543210 ")  # where GNU keeps the access time
    assert ours(archive)[0][0] == "a.txt"
    posix = with_field(make_tar([("a.txt", b"x")], tarfile.USTAR_FORMAT), 0, 345, b"front")
    assert ours(posix)[0][0] == "front/a.txt"


@pytest.mark.parametrize(
    ("start", "content", "message"),
    [
        (124, b"0000000009\0 ", r"byte 0: the size field b'0000000009.* is no number"),
        (124, b"\xff" * 12, r"byte 0: the size field .* is no number"),
        (156, b"S", r"byte 0: member type b'S' \(sparse, multi-volume or a vendor's own\) is not understood"),
    ],
)
def test_what_a_sound_header_may_not_say(start: int, content: bytes, message: str) -> None:
    with pytest.raises(TarError, match=message):
        ours(with_field(make_tar([("a.txt", b"x")]), 0, start, content))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"11 path=ab\n", None),
        (b"10 path=ab\n", r"byte 512: a pax record's length or form is wrong"),
        (b"12 path=ab\n", r"byte 512: a pax record's length or form is wrong"),
        (b"11 path=ab\n11 path:ab\n", r"byte 523: a pax record's length or form is wrong"),
        (b"x1 path=ab\n", r"byte 512: a pax record's length or form is wrong"),
        (b"9 size=x\n", r"byte 0: the pax record size='x' is no number"),
        (b"20 GNU.sparse.major=1\n"[:20] + b"1\n", r"is wrong"),
        (b"22 GNU.sparse.major=1\n", r"sparse files are not understood"),
    ],
)
def test_pax_records(records: bytes, message: str | None) -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    padded = records + bytes(-len(records) % 512)
    archive = info.tobuf(tarfile.USTAR_FORMAT) + padded + make_tar([("a.txt", b"x")])
    if message is None:
        assert ours(archive) == [("ab", "file", "", 0, 1, b"x")]
        return
    with pytest.raises(TarError, match=message):
        ours(archive)


def test_a_long_name_without_its_member_is_an_error() -> None:
    archive = make_tar([("n" * 150 + ".txt", b"x")])
    with pytest.raises(TarError, match=r"a\.tar, byte 0: a long name or pax header without its member"):
        ours(archive[:1024] + bytes(1024))


def test_a_payload_is_read_once_and_in_its_turn() -> None:
    members = walk_tar(io.BytesIO(make_tar([("a.txt", b"x"), ("b.txt", b"y")])), "a.tar")
    first = next(members)
    second = next(members)  # the first payload was skipped
    assert second.read() == b"y"
    for member in (first, second):
        with pytest.raises(ValueError, match="is read once, before the next"):
            member.read()


class Trickle(io.RawIOBase):
    """A stream that gives at most 7 bytes a read, as a socket may."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._content.read(min(size, 7))


def test_short_reads_are_no_end() -> None:
    archive = make_tar([("a.txt", b"x" * 700), ("b.txt", b"y")])
    assert [member.read() for member in walk_tar(Trickle(archive), "a.tar")] == [b"x" * 700, b"y"]


# samples


def grouped(files: list[tuple[str, bytes]], **options: object) -> list[Sample | BadSample]:
    members = walk_tar(io.BytesIO(make_tar(files)), "a.tar")
    return list(group_samples(members, "a.tar", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.txt", ("a", "txt")),
        ("a.seg.TXT", ("a", "seg.txt")),
        ("./x.y/a.json.gz", ("./x.y/a", "json.gz")),
        ("x.y/a", None),
        ("a", None),
        ("x/.hidden", None),
        ("a.", ("a", "")),
    ],
)
def test_keys_are_webdatasets(name: str, split: tuple[str, str] | None) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == split
    theirs = base_plus_ext(name)
    if not Path(name).name.startswith("."):
        assert (theirs[0], theirs[1] and theirs[1].lower()) == (split or (None, None))


def test_samples_are_neighbours_of_one_key() -> None:
    files = [(f"d.x/{i}.{field}", f"{i}{field}".encode()) for i in range(3) for field in ("txt", "meta.json")]
    files.insert(2, ("__note__", b"of the writer"))
    samples = grouped(files, keep=lambda field, size: field == "txt")
    assert samples == [
        Sample(f"d.x/{i}", samples[i].offset, {"txt": f"{i}txt".encode()}, {"txt", "meta.json"}) for i in range(3)
    ]
    assert [sample.offset for sample in samples] == [0, 3072, 5120]  # each member a header and one block


def test_bad_samples_stand_in_their_place_and_shift_nothing() -> None:
    files = [("0.txt", b"a"), ("0.cls", b"1"), ("1.txt", b"b"), ("2.txt", b"c"), ("2.cls", b"1"), ("README", b"r")]
    files += [("3.txt", b"d"), ("3.cls", b"1"), ("3.txt", b"e"), ("0.cls", b"1"), ("0.txt", b"f"), ("4.cls", b"")]
    files += [("4.txt", b"g")]
    samples = grouped(files)
    assert [(sample.key, type(sample).__name__) for sample in samples] == [
        ("0", "Sample"),
        ("1", "BadSample"),
        ("2", "Sample"),
        ("README", "BadSample"),
        ("3", "BadSample"),
        ("0", "BadSample"),
        ("4", "Sample"),
    ]
    bad = [sample for sample in samples if isinstance(sample, BadSample)]
    assert [(sample.reason, sample.offset // 1024) for sample in bad] == [
        ("no field cls", 2),
        ("name without an extension", 5),
        ("field twice in a sample", 6),
        ("key twice in an archive", 9),
    ]
    assert "sample '1' lacks the field 'cls', which the archive's first sample '0' has" in bad[0].problem
    assert "sample '3' has the field 'txt' twice, at bytes 6144 and 8192" in bad[2].problem
    assert "sample '0' was there before, at byte 0" in bad[3].problem


def test_a_first_sample_that_lacks_a_field_is_an_error_unless_samples_may() -> None:
    files = [("0.txt", b"a"), ("1.txt", b"b"), ("1.cls", b"1")]
    with pytest.raises(TarError, match=r"a\.tar, byte 2048: sample '1' has the field 'cls', which .* first sample '0'"):
        grouped(files)
    assert [list(sample.names) for sample in grouped(files, optional=["cls"])] == [["txt"], ["txt", "cls"]]  # type: ignore[union-attr]


def test_links_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    os.symlink("a.txt", tmp_path / "c.txt")
    subprocess.run(["tar", "-cf", "x.tar", "a.txt", "b.txt", "c.txt"], cwd=tmp_path, check=True)
    with open(tmp_path / "x.tar", "rb") as stream:
        found = list(group_samples(walk_tar(stream, "x.tar"), "x.tar"))
    assert [(sample.key, getattr(sample, "reason", "")) for sample in found] == [
        ("a", ""),
        ("b.txt", "hard link"),
        ("c.txt", "symbolic link"),
    ]
    assert "Write the archive with `tar --hard-dereference`" in found[1].problem  # type: ignore[union-attr]
