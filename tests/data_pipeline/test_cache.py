"""The node's cache, with real processes: one download, nothing half, nothing beyond the bound, no reader hurt."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipeline.errors import DataError, UserError
from data_pipeline.storage import CacheSettings, NodeCache, RemoteSettings, StorageSettings, open_store
from data_pipeline.storage import cache as cache_module
from data_pipeline.storage.cache import cache_folder
from tests.http_server import Faults, HttpServer

Fill = Callable[[BinaryIO], None]


def made(folder: Path, limit: int = 10**9) -> NodeCache:
    return NodeCache(CacheSettings(folder=str(folder), bytes=limit))


def writes(content: bytes) -> Fill:
    def fill(to: BinaryIO) -> None:
        to.write(content)

    return fill


def never(to: BinaryIO) -> None:
    raise AssertionError("filled although it was there")


def entries(cache: NodeCache) -> set[str]:
    return {name for name in os.listdir(cache.folder) if not name.startswith(".")}


def read(cache: NodeCache, key: str, fill: Fill, size: int | None = None) -> bytes:
    with cache.open(key, fill, size) as entry:
        return entry.read()


class TestEntries:
    @pytest.mark.parametrize("size", [None, 7, 3, 30])
    def test_filled_once_then_read(self, tmp_path: Path, size: int | None) -> None:
        """Whatever size was announced, the content is what was written."""
        cache = made(tmp_path / "deep" / "cache")
        assert read(cache, "key", writes(b"content"), size) == b"content"
        assert read(cache, "key", never, size) == b"content"
        assert read(made(tmp_path / "deep" / "cache"), "key", never) == b"content"
        assert entries(cache) == {"key"}

    def test_fill_may_look_at_what_it_wrote(self, tmp_path: Path) -> None:
        def fill(to: BinaryIO) -> None:
            to.write(b"content")
            to.seek(0)
            assert to.read(7) == b"content"

        assert read(made(tmp_path), "key", fill, 7) == b"content"

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache, flush = made(tmp_path), os.fsync
        flushed: list[tuple[str, bytes, bool]] = []

        def watched(descriptor: int) -> None:
            flush(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            flushed.append((path.name, path.read_bytes(), "key" in entries(cache)))

        monkeypatch.setattr(os, "fsync", watched)
        assert read(cache, "key", writes(b"content"), 30) == b"content"
        assert flushed == [("key.part", b"content", False)]

    def test_a_fill_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        def fill(to: BinaryIO) -> None:
            to.write(b"half")
            raise DataError("its hash is wrong")

        cache = made(tmp_path)
        with pytest.raises(DataError, match="its hash is wrong"):
            cache.open("key", fill, 100)
        assert entries(cache) == set()
        assert read(cache, "key", writes(b"content")) == b"content"

    def test_discarded_entries_are_filled_again(self, tmp_path: Path) -> None:
        cache = made(tmp_path)
        with cache.open("key", writes(b"damaged")) as old:
            cache.discard("key")
            cache.discard("key")
            assert read(cache, "key", writes(b"mended")) == b"mended"
            assert old.read() == b"damaged"

    def test_an_entry_that_appears_between_the_look_and_the_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        look = cache_module._open_entry

        def look_too_early(path: Path) -> None:
            monkeypatch.setattr(cache_module, "_open_entry", look)
            read(made(tmp_path), "key", writes(b"by another"))

        monkeypatch.setattr(cache_module, "_open_entry", look_too_early)
        cache = made(tmp_path)
        assert read(cache, "key", never) == b"by another"
        assert entries(cache) == {"key"}

    def test_a_folder_that_was_cleaned_away(self, tmp_path: Path) -> None:
        cache = made(tmp_path / "cache")
        shutil.rmtree(tmp_path / "cache")
        assert read(cache, "key", writes(b"content")) == b"content"

    def test_keys_that_are_no_file_names(self, tmp_path: Path) -> None:
        cache = made(tmp_path)
        for key in ("", ".", "..", ".bytes", "a/b", "../a", "a.part", "a" * 300, "a\n"):
            with pytest.raises(ValueError, match="can't be the key"):
                cache.open(key, never)

    def test_entries_are_read_only(self, tmp_path: Path) -> None:
        with made(tmp_path).open("key", writes(b"x")) as entry:
            assert not entry.writable()
            assert os.get_inheritable(entry.fileno()) is False


class TestBound:
    def test_the_least_recently_used_goes_first(self, tmp_path: Path) -> None:
        cache = made(tmp_path, 1000)
        for key in "abc":
            read(cache, key, writes(bytes(300)))
        read(cache, "a", never)
        read(cache, "d", writes(bytes(300)), 300)
        assert entries(cache) == {"a", "c", "d"}

    @pytest.mark.parametrize("announced", [False, True])
    def test_never_more_than_the_bound(self, tmp_path: Path, announced: bool) -> None:
        """Random sizes; the files on the disk are added up after every entry, and during every announced fill."""
        cache, limit = made(tmp_path, 10_000), 10_000
        for number in range(200):
            size = number * 7919 % 3001

            def fill(to: BinaryIO, size: int = size) -> None:
                to.write(bytes(size))
                to.flush()
                if announced:
                    assert on_disk(cache) <= limit

            cache.open(f"key{number}", fill, size if announced else None).close()
            assert on_disk(cache) <= limit
            assert f"key{number}" in entries(cache)
        assert on_disk(cache) > 0.6 * limit

    def test_an_entry_larger_than_the_cache(self, tmp_path: Path) -> None:
        cache = made(tmp_path, 1000)
        read(cache, "small", writes(b"x"))
        for fill, size in ((never, 1001), (writes(bytes(1001)), None)):
            with pytest.raises(
                UserError, match=r"may hold 1000 bytes, but key alone needs 1001\. Raise `cache\.bytes`"
            ):
                cache.open("key", fill, size)
        assert entries(cache) == {"small"}

    def test_a_reader_keeps_what_was_evicted(self, tmp_path: Path) -> None:
        cache = made(tmp_path, 1000)
        with cache.open("old", writes(b"o" * 600)) as old:
            read(cache, "new", writes(b"n" * 600))
            assert entries(cache) == {"new"}
            assert os.pread(old.fileno(), 1000, 0) == b"o" * 600

    def test_other_files_of_the_folder_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_bytes(bytes(5000))
        cache = made(tmp_path, 1000)
        for key in "abc":
            read(cache, key, writes(bytes(600)))
        assert (tmp_path / "thesis.tex").exists()

    def test_a_damaged_ledger_is_counted_anew(self, tmp_path: Path) -> None:
        cache = made(tmp_path, 1000)
        for key in "abcdef":
            (cache.folder / ".bytes").write_bytes(b"rubbish" if key > "c" else b"")
            read(cache, key, writes(bytes(400)))
            assert on_disk(cache) <= 1000


def on_disk(cache: NodeCache) -> int:
    return sum((cache.folder / name).stat().st_size for name in entries(cache))


class TestFolders:
    def test_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "named"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder(CacheSettings(folder="here")) == Path("here")
        assert cache_folder(CacheSettings()) == tmp_path / "named"
        monkeypatch.delenv("HEADRACE_CACHE")
        assert cache_folder(CacheSettings()) == tmp_path / "xdg" / "headrace"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder(CacheSettings()) == Path.home() / ".cache" / "headrace"

    def test_not_writable(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/cache")):
            with pytest.raises(UserError, match=r"can't be written .* Give `cache\.folder`, or set HEADRACE_CACHE"):
                made(folder)

    def test_full_by_file_size_limit(self, tmp_path: Path) -> None:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            message = pool.apply(fill_beyond_limit, (tmp_path,))
        assert "is full" in message
        assert "lower `cache.bytes`" in message
        assert entries(made(tmp_path)) == set()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
    def test_full_disk(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        try:
            cache = made(disk)
            read(cache, "small", writes(b"x" * 1000))
            with pytest.raises(UserError, match=r"the disk of the cache folder .* is full: key could not be written"):
                cache.open("key", writes(bytes(2 * 2**20)), 2 * 2**20)
            assert entries(cache) == {"small"}
            assert read(cache, "key", writes(b"y" * 500_000)) == b"y" * 500_000
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


def fill_beyond_limit(folder: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        made(folder).open("key", writes(bytes(100_000)))
    except UserError as error:
        return str(error)
    return "no error"


CONTENT = os.urandom(300_000)
SETTINGS = StorageSettings(remote=RemoteSettings(first_backoff_seconds=0.01, range_bytes=100_000))


def download(url: str, name: str) -> Fill:
    def fill(to: BinaryIO) -> None:
        open_store(url, SETTINGS).fetch(name, to)

    return fill


def ask(folder: Path, url: str, keys: list[str], start: float, answer: Connection) -> None:
    cache = made(folder)
    time.sleep(max(0.0, start - time.time()))
    answer.send([hashlib.sha256(read(cache, key, download(url, key), len(CONTENT))).digest() for key in keys])


class TestProcesses:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[HttpServer]:
        (tmp_path / "remote").mkdir()
        for name in ("a", "b", "c"):
            (tmp_path / "remote" / name).write_bytes(CONTENT)
        with HttpServer(tmp_path / "remote", Faults(latency=0.02)) as server:
            yield server

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_many_ask_one_downloads(self, tmp_path: Path, server: HttpServer, method: str) -> None:
        context = multiprocessing.get_context(method)
        start = time.time() + (0.2 if method == "fork" else 1.5)
        children = []
        for number in range(4):
            here, there = context.Pipe(duplex=False)
            keys = ["a", "b", "c"] if number % 2 else ["c", "a", "b"]
            child = context.Process(target=ask, args=(tmp_path / "cache", server.url, keys, start, there))
            child.start()
            children.append((child, here))
        for child, here in children:
            assert here.poll(60)
            assert here.recv() == [hashlib.sha256(CONTENT).digest()] * 3
            child.join(10)
            assert child.exitcode == 0
        assert server.gets == dict.fromkeys(("a", "b", "c"), 3)  # 3 ranges each, once

    def test_threads_of_one_process_too(self, tmp_path: Path, server: HttpServer) -> None:
        cache, results = made(tmp_path / "cache"), []
        threads = [
            threading.Thread(target=lambda: results.append(read(cache, "a", download(server.url, "a"))))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert results == [CONTENT] * 6
        assert server.gets == {"a": 3}

    def test_a_killed_filler_leaves_nothing_trusted(self, tmp_path: Path) -> None:
        cache = made(tmp_path)
        for key in ("again", "never"):
            child = start_filling(tmp_path, key)
            part = cache.folder / f"{key}.part"
            assert part.stat().st_size == 1000
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join(10)
            assert part.exists()
        assert read(cache, "again", writes(b"whole")) == b"whole"
        assert entries(cache) == {"again", "never.part"}
        assert entries(made(tmp_path)) == {"again"}

    def test_room_is_made_of_what_the_killed_left(self, tmp_path: Path) -> None:
        cache = made(tmp_path, 1500)
        child = start_filling(tmp_path, "dead")
        alive = start_filling(tmp_path, "alive")
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(10)
        read(cache, "key", writes(bytes(1200)))
        assert entries(cache) == {"key", "alive.part"}
        alive.terminate()
        alive.join(10)

    def test_a_waiter_takes_over_from_a_killed_filler(self, tmp_path: Path) -> None:
        cache, results = made(tmp_path), []
        child = start_filling(tmp_path, "key")
        waiter = threading.Thread(target=lambda: results.append(read(cache, "key", writes(b"whole"), 5)))
        waiter.start()
        time.sleep(0.2)
        assert not results
        os.kill(child.pid or 0, signal.SIGKILL)
        waiter.join(20)
        child.join(10)
        assert results == [b"whole"]
        assert entries(cache) == {"key"}

    def test_under_pressure_all_read_right_bytes(self, tmp_path: Path) -> None:
        """More processes than the bound has room for, each evicting the others' entries all the time."""
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=press, args=(tmp_path, seed)) for seed in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        cache = made(tmp_path, 10_000)
        assert not [name for name in entries(cache) if name.endswith(".part")]
        assert on_disk(cache) <= 10_000

    def test_kills_at_random_moments(self, tmp_path: Path) -> None:
        moments = random.Random(0)
        for seed in range(25):
            child = multiprocessing.get_context("fork").Process(target=press, args=(tmp_path, seed))
            child.start()
            time.sleep(moments.uniform(0.0, 0.04))
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join(10)
        press(tmp_path, 100)
        cache = made(tmp_path, 10_000)
        assert on_disk(cache) <= 10_000
        assert not [name for name in entries(cache) if name.endswith(".part")]


def press(folder: Path, seed: int) -> None:
    cache = made(folder, 10_000)
    for number in range(150):
        which = (number * (seed + 3)) % 17
        content = bytes([which]) * (500 + 150 * which)
        assert read(cache, f"k{which}", writes(content), len(content) if number % 2 else None) == content


def start_filling(folder: Path, key: str) -> multiprocessing.process.BaseProcess:
    """A process that is in the middle of filling ``key`` and stays there."""
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def fill(to: BinaryIO) -> None:
        to.write(b"half")
        to.flush()
        started.set()
        time.sleep(60)

    child = context.Process(target=lambda: made(folder).open(key, fill, 1000))
    child.start()
    assert started.wait(20)
    return child


class TestContentNotAddress:
    """Keys are hashes of content: names and addresses neither collide nor keep apart what is the same."""

    def test_same_name_in_two_folders(self, tmp_path: Path) -> None:
        for folder, content in (("one", b"1" * 1000), ("two", b"2" * 1000)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "000000.tar").write_bytes(content)
        cache = made(tmp_path / "cache")
        with HttpServer(tmp_path) as server:
            for folder, content in (("one", b"1" * 1000), ("two", b"2" * 1000)):
                key = hashlib.sha256(content).hexdigest()
                assert read(cache, key, download(f"{server.url}/{folder}", "000000.tar")) == content

    def test_token_that_rotates(self, tmp_path: Path) -> None:
        (tmp_path / "000000.tar").write_bytes(CONTENT)
        cache, key = made(tmp_path / "cache"), hashlib.sha256(CONTENT).hexdigest()
        with HttpServer(tmp_path) as server:
            for token in ("old", "new"):
                assert read(cache, key, download(f"{server.url}/?token={token}", "000000.tar")) == CONTENT
            assert server.gets == {"000000.tar": 3}
        shutil.rmtree(cache.folder)
