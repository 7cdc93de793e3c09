"""Object stores through fsspec: its memory file system always; s3 against a local S3 server where s3fs is installed."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

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
    remote=RemoteSettings(attempts=4, first_backoff_seconds=0.01, range_bytes=10_000, parallel=3, timeout_seconds=2.0)
)
CONTENT = bytes(range(256)) * 300 + b"end"


def check_reads(store: Store, input_url: str) -> None:
    """Everything a store offers, on the file deep/a.bin of ``CONTENT`` and the file empty."""
    assert (store.local, store.ranges) == (None, True)
    assert store.size("deep/a.bin") == len(CONTENT)
    assert store.read("deep/a.bin") == CONTENT
    assert store.read("empty") == b""
    to = io.BytesIO()
    assert store.fetch("deep/a.bin", to, len(CONTENT)) == len(CONTENT)
    assert to.getvalue() == CONTENT
    for start, stop in ((0, 1), (9, 9), (3, 10_004), (777, len(CONTENT))):
        assert store.read_range("deep/a.bin", start, stop) == CONTENT[start:stop]
    for start in (0, len(CONTENT) - 5, len(CONTENT), len(CONTENT) + 9):
        with pytest.raises(StorageError, match=f"it has {len(CONTENT)} bytes"):
            store.read_range("deep/a.bin", start, len(CONTENT) + 10)
    with open_input(input_url, QUICK) as stream:
        assert stream.read(5) == CONTENT[:5]
        assert stream.read() == CONTENT[5:]
    assert store.retries == 0


def check_missing(store: Store) -> None:
    for name in ("none", "deep"):
        assert not store.exists(name)
        for read in (store.read, store.size, lambda name: store.read_range(name, 0, 10)):
            with pytest.raises(MissingFileError, match=name):
                read(name)
    assert store.retries == 0


class TestMemory:
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        memory = fsspec.filesystem("memory")
        memory.pipe({"/bucket/deep/a.bin": CONTENT, "/bucket/empty": b""})
        yield open_store("memory://bucket", QUICK)
        memory.rm("/bucket", recursive=True)

    def test_reads(self, store: Store) -> None:
        check_reads(store, "memory://bucket/deep/a.bin")

    def test_missing(self, store: Store) -> None:
        assert not store.exists("none")
        with pytest.raises(MissingFileError, match="none"):
            store.read_range("none", 0, 10)

    def test_survives_pickling(self, store: Store) -> None:
        assert pickle.loads(pickle.dumps(store)).read("deep/a.bin") == CONTENT


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="s3 needs the extra `remote`")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.mark.usefixtures("credentials")
class TestS3:
    """moto's server speaks S3 as Amazon's does."""

    @pytest.fixture
    def root(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        moto = pytest.importorskip("moto.server", reason="the local S3 server is moto's")
        server = moto.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.makedirs("bucket", exist_ok=True)  # the server's buckets outlive it
        files.pipe({"bucket/data/deep/a.bin": CONTENT, "bucket/data/empty": b""})
        yield "s3://bucket/data"
        server.stop()

    def test_reads(self, root: str) -> None:
        check_reads(open_store(root, QUICK), f"{root}/deep/a.bin")

    def test_missing(self, root: str) -> None:
        check_missing(open_store(root, QUICK))
        check_missing(open_store("s3://other-bucket/data", QUICK))

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_processes(self, root: str, method: str) -> None:
        store = open_store(root, QUICK)
        assert store.read("deep/a.bin") == CONTENT  # its event loop runs when the child is born
        context = multiprocessing.get_context(method)
        results = context.Queue()
        child = context.Process(target=read_into, args=(store, results))
        child.start()
        assert results.get(timeout=60) == CONTENT
        child.join(10)
        assert child.exitcode == 0


def read_into(store: Store, results: multiprocessing.Queue[bytes]) -> None:
    results.put(store.read("deep/a.bin"))


@pytest.mark.usefixtures("credentials")
class TestFaultyS3:
    """For reading, S3 is HEAD and GET by range: what our faulty server does."""

    @pytest.fixture
    def server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
        (tmp_path / "bucket" / "deep").mkdir(parents=True)
        (tmp_path / "bucket" / "deep" / "a.bin").write_bytes(CONTENT)
        with HttpServer(tmp_path) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            yield server

    @pytest.mark.parametrize("fault", ["error", "500", "early_close", "reset", "short_range"])
    def test_right_bytes_after_a_counted_retry(self, server: HttpServer, fault: str) -> None:
        server.plan("bucket/deep/a.bin", "ok", fault, fault)
        store = open_store("s3://bucket", QUICK)
        assert store.read("deep/a.bin") == CONTENT
        assert server.faulty == 2
        assert store.retries == 2

    def test_a_fault_that_stays(self, server: HttpServer) -> None:
        server.plan("bucket/deep/a.bin", *["early_close"] * 20)
        store = open_store("s3://bucket", QUICK)
        with pytest.raises(StorageError, match="attempt 4 of 4") as caught:
            store.read_range("deep/a.bin", 0, 100)
        assert caught.value.transient

    def test_refusals_are_not_retried(self, server: HttpServer) -> None:
        server.plan("bucket/deep/a.bin", "403")
        store = open_store("s3://bucket", QUICK)
        with pytest.raises(StorageError, match="access is refused"):
            store.read_range("deep/a.bin", 0, 100)
        assert store.retries == 0

    def test_no_credentials(self, server: HttpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", os.fspath(tmp_path))
        with pytest.raises(StorageError, match=r"access failed \(NoCredentialsError: .*credentials"):
            open_store("s3://bucket", QUICK).read("deep/a.bin")
