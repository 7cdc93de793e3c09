"""Inputs that are not files of this machine: a real local server, real commands."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_pipeline.errors import DataError, UserError
from data_pipeline.sources import AnySource, Document, JsonlSource, TextSource, WebDatasetSource
from data_pipeline.sources.inputs import find_inputs
from data_pipeline.storage import MissingFileError, RemoteSettings, StorageError, StorageSettings

FAST = StorageSettings(
    remote=RemoteSettings(
        attempts=3, first_backoff_seconds=0, longest_backoff_seconds=0, deadline_seconds=10, range_bytes=4096
    )
)


class Server(ThreadingHTTPServer):
    """Serves the files of ``folder`` by byte range, with ``faults`` by name: how many of the next answers fail."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, int] = {}
        self.ranges = True
        self.by_query = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        name, _, query = self.path.lstrip("/").partition("?")
        name = query.removeprefix("file=") if self.server.by_query else name
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.server.ranges else None
        start, stop = (int(wanted[1]), min(int(wanted[2]) + 1, len(content))) if wanted else (0, len(content))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if not body:
            return
        if self.server.faults.get(name, 0) and (start or not self.server.ranges):
            self.server.faults[name] -= 1
            self.wfile.write(content[start : (start + stop) // 2])  # closes early
            self.close_connection = True
            return
        self.wfile.write(content[start:stop])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    served = tmp_path / "served"
    served.mkdir()
    server = Server(served)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def tar_of(texts: list[str]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"{number:03d}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return target.getvalue()


TEXTS = [f"text {i} " + "é" * i for i in range(60)]


def webdataset(*files: str) -> WebDatasetSource:
    return WebDatasetSource(kind="webdataset", domain="d", files=files)


def read(source: AnySource, storage: StorageSettings = FAST) -> list[tuple[str, str]]:
    records = [record for part in source.parts(1, storage) for record in source.read(part, storage)]
    return [(record.text, record.url) for record in records if isinstance(record, Document)]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [0, 2])
def test_tars_behind_http(server: Server, ranges: bool, faults: int) -> None:
    for number in range(3):
        (server.folder / f"{number:02d}.tar").write_bytes(tar_of(TEXTS[number::3]))
    server.ranges, server.faults = ranges, {"01.tar": faults}
    source = webdataset(server.address + "/{00..02}.tar")
    sizes = [(server.folder / f"{number:02d}.tar").stat().st_size for number in range(3)]
    assert [part.bytes for part in source.parts(1, FAST)] == sizes
    assert read(source) == [
        (text, f"{server.address}/{number:02d}.tar#{i:03d}")
        for number in range(3)
        for i, text in enumerate(TEXTS[number::3])
    ]
    assert server.faults == {"01.tar": 0}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_never_comes_to_its_end_is_an_error_that_names_the_file(server: Server, ranges: bool) -> None:
    (server.folder / "a.tar").write_bytes(tar_of(TEXTS))
    server.ranges, server.faults = ranges, {"a.tar": 1000}
    with pytest.raises(StorageError, match=rf"{server.address}/a\.tar.*from byte \d+"):
        read(webdataset(server.address + "/a.tar"))


def test_a_damaged_tar_behind_http_is_the_same_error(server: Server) -> None:
    (server.folder / "a.tar").write_bytes(tar_of(TEXTS)[:5120])
    with pytest.raises(DataError, match=rf"{server.address}/a\.tar, byte 5120: the archive is cut off"):
        read(webdataset(server.address + "/a.tar"))


def test_a_missing_address_is_named_before_anything_is_read(server: Server) -> None:
    (server.folder / "0.tar").write_bytes(tar_of(TEXTS))
    with pytest.raises(MissingFileError, match=rf"{server.address}/1\.tar: there is no such file"):
        webdataset(server.address + "/{0,1}.tar").parts(1, FAST)


def test_logins_and_tokens_stand_in_no_url_and_no_message(server: Server) -> None:
    (server.folder / "a.tar").write_bytes(tar_of(TEXTS[:1]))
    (server.folder / "b.tar").write_bytes(tar_of(TEXTS[:1])[:-9999])
    host = server.address.removeprefix("http://")
    secret = f"http://me:password@{host}/a.tar?token=abc"
    assert read(webdataset(secret)) == [(TEXTS[0], f"{server.address}/a.tar#000")]
    (server.folder / "c.jsonl").write_bytes(b'{"text": "one"}\n[]\n')
    lines = JsonlSource(kind="jsonl", domain="d", files=(secret.replace("/a.tar", "/c.jsonl"),), on_bad_record="drop")
    assert read(lines) == [("one", f"{server.address}/c.jsonl#byte=0")]
    for source in (webdataset(secret.replace("/a.tar", "/b.tar")), lines.model_copy(update={"on_bad_record": "stop"})):
        with pytest.raises(DataError, match=r"(b\.tar|c\.jsonl), byte") as error:
            read(source)
        assert "password" not in str(error.value)
        assert "token" not in str(error.value)


def test_a_query_is_part_of_the_address(server: Server) -> None:
    """A server that finds the file by the query alone."""
    (server.folder / "get").write_bytes(b"not this one")
    server.by_query = True
    (server.folder / "7.jsonl").write_bytes(b'{"text": "seven"}\n')
    source = JsonlSource(kind="jsonl", domain="d", files=(f"{server.address}/get?file=7.jsonl",))
    assert source.parts(1, FAST)[0].bytes == 18
    assert read(source) == [("seven", f"{server.address}/get#byte=0")]


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    source = TextSource(kind="text", domain="d", files=(f"file://{tmp_path}/*.txt",))
    assert read(source) == [("one", f"{tmp_path}/a.txt")]


def test_lines_and_texts_behind_http(server: Server) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    (server.folder / "a.jsonl").write_bytes(lines)
    (server.folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (server.folder / "c").write_bytes(gzip.compress(lines))  # known by its first bytes
    source = JsonlSource(
        kind="jsonl", domain="d", files=tuple(f"{server.address}/{n}" for n in ("a.jsonl", "b.jsonl.gz", "c"))
    )
    assert len(source.parts(1, FAST)) == 3  # whole files: no part begins in the middle of one
    assert [text for text, _ in read(source)] == TEXTS * 3
    assert read(source)[1][1] == f"{server.address}/a.jsonl#byte={lines.index(b'{', 1)}"
    (server.folder / "a.jsonl").write_bytes(lines + b"[]\n")
    with pytest.raises(
        DataError, match=rf"{server.address}/a\.jsonl, byte {len(lines)}: holds list, not a JSON object"
    ):
        read(source)

    (server.folder / "d.txt").write_bytes(b"one\nEND\ntwo\nEND\n")
    text = TextSource(kind="text", domain="d", files=(server.address + "/d.txt",), separator="END")
    assert read(text) == [("one", f"{server.address}/d.txt#byte=0"), ("two", f"{server.address}/d.txt#byte=8")]
    assert read(text.model_copy(update={"separator": None})) == [("one\nEND\ntwo\nEND\n", f"{server.address}/d.txt")]


def test_the_stamp_of_a_remote_file_is_its_size(server: Server) -> None:
    (server.folder / "a.tar").write_bytes(tar_of(TEXTS))
    source = webdataset(server.address + "/a.tar", "pipe:true")
    size = (server.folder / "a.tar").stat().st_size
    assert source.stamp(FAST) == {f"{server.address}/a.tar": f"{size} bytes", "pipe:true": "of unknown size"}


# commands


@pytest.mark.parametrize("pack", ["", " | gzip", " | zstd -q"])
def test_what_a_command_prints(tmp_path: Path, pack: str) -> None:
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(TEXTS[number::2]))
    source = webdataset(f"pipe:cat {tmp_path}/{{0,1}}.tar{pack}")
    expected = [
        (text, f"pipe:cat {tmp_path}/{number}.tar{pack}#{i:03d}")
        for number in range(2)
        for i, text in enumerate(TEXTS[number::2])
    ]
    assert read(source) == expected
    assert [part.bytes for part in source.parts(1)] == [0, 0]


def test_a_command_that_fails_after_its_last_byte_is_an_error_and_loses_nothing_before(tmp_path: Path) -> None:
    """Plain webdataset notices the exit status or not, by chance, and with it drops documents that it had read."""
    (tmp_path / "a.tar").write_bytes(tar_of(TEXTS))
    command = f"pipe:cat {tmp_path}/a.tar; exit 3"
    source = webdataset(command)
    ours, error = until_error(record.text for record in source.read(source.parts(1)[0], FAST))  # type: ignore[union-attr]
    assert ours == TEXTS[:-1]  # the last sample is known to be whole when the archive has ended well
    assert isinstance(error, StorageError)
    assert re.search(r"exit 3.*status 3", str(error))


def until_error(items: Iterable[object]) -> tuple[list[object], Exception | None]:
    found: list[object] = []
    try:
        for item in items:
            found.append(item)
    except (OSError, DataError) as error:
        return found, error
    return found, None


def test_what_a_command_unpacks_is_not_unpacked_again(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_of(TEXTS)))
    for command in ("zcat", "cat"):
        assert [text for text, _ in read(webdataset(f"pipe:{command} {tmp_path}/a.tar.gz"))] == TEXTS


def test_backslashes_of_a_command_are_its_own() -> None:
    """Only those before a brace or a comma belong to the pattern."""
    command = r"""pipe:printf '\{"text": "%s\\n\u00e9"\}\n' {one,two}"""
    expected = [rf"""pipe:printf '{{"text": "%s\\n\u00e9"}}\n' {word}""" for word in ("one", "two")]
    assert find_inputs([command], "test", FAST) == expected
    source = JsonlSource(kind="jsonl", domain="d", files=(command,))
    assert [text for text, _ in read(source)] == ["one\n\u00e9", "two\n\u00e9"]


def test_a_command_that_prints_nothing_is_told() -> None:
    for source in (
        JsonlSource(kind="jsonl", domain="d", files=("pipe:true",)),
        TextSource(kind="text", domain="d", files=("pipe:true",)),
        WebDatasetSource(kind="webdataset", domain="d", files=("pipe:true",)),
    ):
        with pytest.raises(DataError, match=r"pipe:true: is empty \(0 bytes\)"):
            read(source)


def test_what_a_command_prints_byte_by_byte_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    slowly = f"head -c1 {tmp_path}/a; sleep 0.2; tail -c+2 {tmp_path}/a"
    source = JsonlSource(kind="jsonl", domain="d", files=(f"pipe:{slowly}",))
    assert [text for text, _ in read(source)] == ["one"]
    failing = source.model_copy(update={"files": ("pipe:printf '{}'; exit 3",), "on_bad_record": "drop"})
    with pytest.raises(StorageError, match="ended with exit status 3"):
        read(failing)


def test_a_star_in_an_address_is_explained() -> None:
    with pytest.raises(
        UserError, match=r"input 's3://bucket/\*\.tar' \(source of domain 'd'\): remote folders are not"
    ):
        webdataset("s3://bucket/*.tar").parts(1)


def test_each_command_is_a_part() -> None:
    commands = tuple(f"""pipe:echo '\\{{"text": "{i}"\\}}'""" for i in range(3))  # braces of its own are escaped
    source = JsonlSource(kind="jsonl", domain="d", files=commands)
    assert [len(part.spans) for part in source.parts(1 << 30)] == [1, 1, 1]
    assert [text for text, _ in read(source)] == ["0", "1", "2"]


def test_commands_are_refused_where_they_are_not_trusted() -> None:
    secure = StorageSettings(secure=True)
    for source in (webdataset("pipe:true"), JsonlSource(kind="jsonl", domain="d", files=("pipe:true",))):
        with pytest.raises(
            UserError, match=r"input 'pipe:true' \(source of domain 'd'\) runs a command, which `secure:"
        ):
            source.parts(1, secure)


def test_a_scheme_that_nobody_knows_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UserError, match=r"nobody knows the scheme 'htpps' of 'htpps://host/'; did you mean 'https'"):
        webdataset("htpps://host/a.tar").parts(1)


def test_an_object_store(tmp_path: Path) -> None:
    """fsspec's memory file system stands for s3 and gs: the same calls, no account."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/a b.tar", tar_of(TEXTS))
    assert [text for text, _ in read(webdataset("memory://bucket/a b.tar"))] == TEXTS
    memory.pipe_file("/bucket/a b.tar", tar_of(TEXTS)[:1000])
    with pytest.raises(DataError, match=r"memory://bucket/a b\.tar, byte 1000: the archive is cut off"):
        read(webdataset("memory://bucket/a b.tar"))
