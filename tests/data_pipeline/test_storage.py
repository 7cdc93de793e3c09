"""One interface over a folder, http and commands: equal bytes, exact ranges, plain refusals, whole inputs."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.errors import EXIT_CRASH, EXIT_USER_ERROR, UserError
from data_pipeline.settings import build_settings
from data_pipeline.storage import (
    MissingFileError,
    RemoteSettings,
    StorageError,
    StorageSettings,
    Store,
    open_input,
    open_store,
)
from tests.http_server import HttpServer

QUICK = StorageSettings(
    remote=RemoteSettings(attempts=4, first_backoff_seconds=0.01, timeout_seconds=2.0, range_bytes=10_000, parallel=3)
)
SECURE = QUICK.model_copy(update={"secure": True})
CONTENT = bytes(range(256)) * 400 + b"the end"
NAME = "deep/a file {1} é.bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    (folder / "deep").mkdir()
    (folder / NAME).write_bytes(CONTENT)
    (folder / "empty").touch()
    (folder / "lines.txt").write_bytes(b"".join(b"line %d\n" % number for number in range(30_000)))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[HttpServer]:
    with HttpServer(folder) as server:
        yield server


@pytest.fixture(params=["local", "file", "http", "pipe"])
def root(request: pytest.FixtureRequest, folder: Path, server: HttpServer) -> str:
    roots = {"local": str(folder), "file": f"file://{folder}", "http": server.url, "pipe": f"pipe:cat {folder}/{{}}"}
    return roots[request.param]


@pytest.fixture
def store(root: str) -> Store:
    return open_store(root, QUICK)


class TestEveryStore:
    def test_whole_files(self, store: Store, folder: Path) -> None:
        for name in (NAME, "empty", "lines.txt"):
            expected = (folder / name).read_bytes()
            assert store.read(name) == expected
            assert b"".join(store.stream(name, len(expected))) == expected
            to = io.BytesIO(b"before")
            to.seek(0, io.SEEK_END)
            assert store.fetch(name, to, len(expected)) == len(expected)
            assert to.getvalue() == b"before" + expected
        assert store.retries == 0

    def test_another_size_than_expected_is_an_error(self, store: Store) -> None:
        for wrong in (len(CONTENT) - 1, len(CONTENT) + 1):
            with pytest.raises(
                StorageError, match=rf"{len(CONTENT)} bytes|byte {len(CONTENT)} where {wrong}"
            ) as caught:
                store.fetch(NAME, io.BytesIO(), wrong)
            assert caught.value.name == NAME
            assert not caught.value.transient

    def test_a_missing_file_is_an_error(self, store: Store) -> None:
        with pytest.raises(StorageError, match=r"deep/none\.bin") as caught:
            store.read("deep/none.bin")
        assert isinstance(caught.value, MissingFileError) == store.ranges

    def test_ranges(self, store: Store, folder: Path) -> None:
        if not store.ranges:
            with pytest.raises(UserError, match="can only be read whole"):
                store.read_range(NAME, 0, 1)
            with pytest.raises(UserError, match="no size"):
                store.exists(NAME)
            return
        expected = (folder / "lines.txt").read_bytes()
        assert store.size("lines.txt") == len(expected)
        assert store.size("empty") == 0
        assert store.exists(NAME)
        assert not store.exists("none")
        for start, stop in ((0, 1), (5, 5), (0, 10_000), (3, 10_004), (777, len(expected)), (0, len(expected))):
            assert store.read_range("lines.txt", start, stop) == expected[start:stop]
        for start in (0, len(expected) - 5, len(expected), len(expected) + 9):
            with pytest.raises(StorageError, match=r"ends"):
                store.read_range("lines.txt", start, len(expected) + 10)
        assert store.retries == 0

    def test_local_says_where(self, store: Store, folder: Path, root: str) -> None:
        assert store.local == (None if root.startswith(("http", "pipe")) else folder)

    def test_threads_share_a_store(self, store: Store, folder: Path) -> None:
        expected = (folder / "lines.txt").read_bytes()
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(store.read, ["lines.txt"] * 12)) == [expected] * 12

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_processes_share_a_store(self, store: Store, folder: Path, method: str) -> None:
        assert store.read(NAME) == CONTENT  # connections and threads exist when the child is born
        context = multiprocessing.get_context(method)
        results = context.Queue()
        child = context.Process(target=read_into, args=(store, "lines.txt", results))
        child.start()
        assert results.get(timeout=60) == (folder / "lines.txt").read_bytes()
        child.join(10)
        assert child.exitcode == 0
        assert store.read(NAME) == CONTENT

    def test_names_that_leave_the_root(self, root: str) -> None:
        if root.startswith("pipe:"):
            with pytest.raises(UserError, match="runs a shell command, which the setting `secure` forbids"):
                open_store(root, SECURE)
            return
        store = open_store(root, SECURE)
        assert store.read(NAME) == CONTENT
        for name in ("../other", "deep/../../other", "/etc/hostname"):
            for read in (store.read, store.size, lambda name: store.read_range(name, 0, 1)):
                with pytest.raises(UserError, match=r"leaves its root .*`secure` forbids"):
                    read(name)


def read_into(store: Store, name: str, results: multiprocessing.Queue[bytes]) -> None:
    results.put(store.read(name))


class TestRoots:
    def test_unknown_scheme(self) -> None:
        with pytest.raises(UserError, match=r"nobody knows the scheme 'htpps'.*did you mean 'https'"):
            open_store("htpps://host/path")

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
        with pytest.raises(UserError, match=r"needs a package.*pip install 'headrace\[remote\]'"):
            open_store("gs://bucket/path")

    def test_command_without_a_place_for_the_name(self) -> None:
        with pytest.raises(UserError, match=r"has no \{\} where the name of a file is to stand"):
            open_store("pipe:cat file")

    def test_address_without_a_host(self) -> None:
        with pytest.raises(UserError, match="names no host"):
            open_store("http:///path")

    def test_settings_are_closed(self) -> None:
        with pytest.raises(UserError, match=r"unknown key 'remote.paralel'.*did you mean 'parallel'"):
            build_settings(StorageSettings, {"remote": {"paralel": 3}}, "test")


class TestErrors:
    def test_survives_the_way_from_a_worker(self) -> None:
        for kind, transient in ((StorageError, True), (MissingFileError, False)):
            error = kind("root", "name", 7, "it broke", "Mend it.", transient=transient)
            copy = pickle.loads(pickle.dumps(error))
            assert type(copy) is kind
            assert vars(copy) == vars(error)
            assert str(copy) == "root/name, from byte 7: it broke. Mend it."
            assert copy.exit_code == (EXIT_CRASH if transient else EXIT_USER_ERROR)


class TestOpenInput:
    @pytest.fixture(params=["path", "file", "http", "pipe"])
    def url(self, request: pytest.FixtureRequest, folder: Path, server: HttpServer) -> str:
        file = folder / "lines.txt"
        urls = {
            "path": str(file),
            "file": f"file://{file}",
            "http": f"{server.url}/lines.txt?x=1",
            "pipe": f"pipe:cat {file}",
        }
        return urls[request.param]

    def test_reads_as_a_file(self, url: str, folder: Path) -> None:
        expected = (folder / "lines.txt").read_bytes()
        with open_input(url, QUICK) as stream:
            assert stream.read() == expected
            assert stream.read(10) == b""
        with open_input(url, QUICK) as stream:
            assert list(stream) == expected.splitlines(keepends=True)
        with open_input(url, QUICK) as stream:
            assert [stream.read(9), stream.read(0), stream.readline()] == [b"line 0\nli", b"", b"ne 1\n"]
            assert stream.read(100_000) == expected[14:100_014]
            buffer = bytearray(5)
            assert stream.readinto(buffer) == 5

    def test_secure_forbids_commands_only(self, url: str) -> None:
        if url.startswith("pipe:"):
            with pytest.raises(UserError, match="`secure` forbids"):
                open_input(url, SECURE)
        else:
            with open_input(url, SECURE) as stream:
                assert stream.read(4) == b"line"

    def test_missing(self, url: str) -> None:
        with open_input(url.replace("lines", "none"), QUICK) as stream, pytest.raises(StorageError, match=r"none\.txt"):
            stream.read()

    def test_closing_early_is_fine(self, url: str) -> None:
        with open_input(url, QUICK) as stream:
            assert stream.read(4) == b"line"
        assert stream.closed

    def test_relative_path(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        with open_input("empty") as stream:
            assert stream.read() == b""
        with open_input(os.path.join("deep", "..", "lines.txt"), SECURE) as stream:
            assert stream.readline() == b"line 0\n"
