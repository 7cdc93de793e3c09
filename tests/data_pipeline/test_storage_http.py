"""A server with every fault we know of: the right bytes after a counted retry, or an error; never other bytes."""

from __future__ import annotations

import io
import json
import logging
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import EXIT_CRASH
from data_pipeline.storage import (
    AccessError,
    MissingFileError,
    RemoteSettings,
    StorageError,
    StorageSettings,
    open_input,
    open_store,
)
from data_pipeline.storage import retries as retries_module
from data_pipeline.storage.retries import Deadline, Retries
from tests.http_server import Faults, HttpServer

PIECE = 50_000
CONTENT = np.random.default_rng(0).bytes(10 * PIECE + 123)
QUICK = StorageSettings(
    remote=RemoteSettings(attempts=5, first_backoff_seconds=0.01, timeout_seconds=10.0, range_bytes=PIECE, parallel=4)
)
IMPATIENT = StorageSettings(remote=QUICK.remote.model_copy(update={"timeout_seconds": 0.4}))
TRANSIENT = [
    "error",
    "429",
    "500",
    "early_close",
    "reset",
    "stall",
    "html",
    "wrong_range",
    "short_range",
    "lying_range",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    (folder / "a.bin").write_bytes(CONTENT)
    (folder / "page.html").write_bytes(b"<html>a file that is a page</html>")
    (folder / "empty").touch()
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[HttpServer]:
    with HttpServer(folder) as server:
        yield server


def settings_for(fault: str) -> StorageSettings:
    """A silent server costs a time-out; a busy machine must not."""
    return IMPATIENT if fault == "stall" else QUICK


def whole(url: str, settings: StorageSettings = QUICK) -> bytes:
    return open_store(url, settings).read("a.bin")


def fetched(url: str, settings: StorageSettings = QUICK) -> bytes:
    to = io.BytesIO()
    open_store(url, settings).fetch("a.bin", to, len(CONTENT))
    return to.getvalue()


def streamed(url: str, settings: StorageSettings = QUICK) -> bytes:
    with open_input(f"{url}/a.bin", settings) as stream:
        return b"".join(iter(lambda: stream.read(7777), b""))


def by_range(url: str, settings: StorageSettings = QUICK) -> bytes:
    return open_store(url, settings).read_range("a.bin", 0, len(CONTENT))


Way = Callable[..., bytes]
EVERY_WAY = pytest.mark.parametrize("way", [whole, fetched, streamed, by_range])


class TestTransientFaults:
    @EVERY_WAY
    @pytest.mark.parametrize("fault", [*TRANSIENT, "ignore_range"])
    def test_right_bytes_after_a_retry(self, server: HttpServer, fault: str, way: Way) -> None:
        server.plan("a.bin", "ok", fault, "ok", fault)
        assert way(server.url, settings_for(fault)) == CONTENT
        assert server.faulty == 2
        assert server.gets["a.bin"] == 11 + 2

    @EVERY_WAY
    @pytest.mark.parametrize("fault", TRANSIENT)
    def test_the_very_first_answer_is_faulty(self, server: HttpServer, fault: str, way: Way) -> None:
        server.plan("a.bin", fault)
        assert way(server.url, settings_for(fault)) == CONTENT

    @pytest.mark.parametrize("fault", TRANSIENT)
    def test_one_range_counts_its_retries(self, server: HttpServer, fault: str) -> None:
        server.plan("a.bin", fault, fault, fault)
        store = open_store(server.url, settings_for(fault))
        assert store.read_range("a.bin", 1000, 1000 + PIECE) == CONTENT[1000 : 1000 + PIECE]
        assert store.retries == 3
        asked = {wanted for method, _, wanted in server.log if method == "GET"}
        assert asked == {f"bytes=1000-{1000 + PIECE - 1}"}

    @EVERY_WAY
    def test_random_faults_in_any_order(self, folder: Path, way: Way) -> None:
        kinds = random.Random(1)
        with HttpServer(folder) as server:
            for _ in range(3):
                faults = [kinds.choice(["ok", "ok", *(set(TRANSIENT) - {"stall"})]) for _ in range(6)]
                server.plan("a.bin", "ok", *faults)
                assert way(server.url) == CONTENT

    def test_a_server_that_was_away_comes_back(self, folder: Path) -> None:
        with HttpServer(folder) as server:
            url = server.url
        settings = QUICK.model_copy(
            update={"remote": QUICK.remote.model_copy(update={"attempts": 100, "longest_backoff_seconds": 0.1})}
        )
        store = open_store(url, settings)
        late: list[HttpServer] = []

        def start() -> None:
            late.append(HttpServer(folder, port=int(url.rpartition(":")[2])).__enter__())

        threading.Timer(0.3, start).start()
        assert store.read("a.bin") == CONTENT
        assert store.retries >= 1
        late[0].__exit__(None, None, None)


class TestGivingUp:
    @pytest.mark.parametrize("fault", [*(fault for fault in TRANSIENT if fault != "stall"), "ignore_range"])
    def test_a_fault_that_stays_is_an_error(self, server: HttpServer, fault: str) -> None:
        server.plan("a.bin", *[fault] * 20)
        with pytest.raises(StorageError, match=r"a\.bin, from byte 5") as caught:
            open_store(server.url, QUICK).read_range("a.bin", 5, 1005)
        assert server.gets["a.bin"] == (3 if fault == "ignore_range" else 5)
        if fault != "ignore_range":
            assert "attempt 5 of 5" in str(caught.value)
            assert caught.value.transient
            assert caught.value.exit_code == EXIT_CRASH

    def test_deadline(self, server: HttpServer) -> None:
        server.plan("a.bin", *["error"] * 1000)
        remote = RemoteSettings(deadline_seconds=0.4, attempts=1000, first_backoff_seconds=0.1)
        began = time.monotonic()
        with pytest.raises(StorageError, match="HTTP status 503"):
            open_store(server.url, StorageSettings(remote=remote)).read_range("a.bin", 0, 10)
        assert time.monotonic() - began < 2

    @pytest.mark.parametrize(("status", "kind"), [(404, MissingFileError), (410, MissingFileError), (403, AccessError)])
    def test_refusals_are_not_retried(self, server: HttpServer, status: int, kind: type[StorageError]) -> None:
        for ask in (lambda store: store.read("a.bin"), lambda store: store.read_range("a.bin", 0, 9)):
            server.plan("a.bin", str(status))
            store = open_store(server.url, QUICK)
            with pytest.raises(kind, match=f"HTTP status {status}") as caught:
                ask(store)
            assert type(caught.value) is kind
            assert store.retries == 0
            assert not caught.value.transient

    def test_what_came_before_the_failure_is_delivered(self, server: HttpServer) -> None:
        server.plan("a.bin", "ok", "ok", *["error"] * 100)
        settings = QUICK.model_copy(update={"remote": QUICK.remote.model_copy(update={"parallel": 1})})
        with open_input(f"{server.url}/a.bin", settings) as stream:
            assert stream.read() == CONTENT[: 2 * PIECE]
            with pytest.raises(StorageError, match=f"from byte {2 * PIECE}"):
                stream.read()

    def test_a_file_that_changes_while_it_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(CONTENT)
        settings = QUICK.model_copy(update={"remote": QUICK.remote.model_copy(update={"parallel": 1})})
        with HttpServer(tmp_path) as server:
            pieces = open_store(server.url, settings).stream("a.bin")
            next(pieces)
            (tmp_path / "a.bin").write_bytes(CONTENT[::-1])
            with pytest.raises(StorageError, match="the file changed while it was read"):
                list(pieces)

    def test_messages_keep_secrets(self, server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
        server.plan("a.bin", *["error"] * 100)
        address = server.url.replace("//", "//user:pass%40word@") + "?token=secret"
        with pytest.raises(StorageError) as caught, caplog.at_level(logging.WARNING):
            open_store(address, QUICK).read_range("a.bin", 0, 10)
        for text in (str(caught.value), caplog.text, caught.value.root):
            assert "secret" not in text
            assert "word" not in text
        assert server.url in caplog.text


class TestServersWithoutSomething:
    @pytest.mark.parametrize("length", ["known", "chunked"])
    @pytest.mark.parametrize("fault", ["ok", "early_close", "reset", "stall", "html", "error"])
    def test_no_ranges_whole_files(self, folder: Path, length: str, fault: str) -> None:
        with HttpServer(folder, Faults(ranges=False, length=length)) as server:
            for way in (whole, fetched, streamed):
                server.plan("a.bin", "ok", fault, fault)
                assert way(server.url, settings_for(fault)) == CONTENT

    def test_no_ranges_and_the_file_changes(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(bytes(4 * 2**20))
        with HttpServer(tmp_path, Faults(ranges=False)) as server:
            server.plan("a.bin", "ok", "early_close")
            pieces = open_store(server.url, QUICK).stream("a.bin")
            next(pieces)
            (tmp_path / "a.bin").write_bytes(b"x" * 4 * 2**20)
            with pytest.raises(StorageError, match="the file changed while it was read"):
                list(pieces)

    @EVERY_WAY
    def test_ranges_without_a_length(self, folder: Path, way: Way) -> None:
        """Chunks tell where the body ends, but not that it is the range asked for."""
        with HttpServer(folder, Faults(length="chunked")) as server:
            server.plan("a.bin", "lying_range", "ok", "lying_range", "early_close", "short_range")
            assert way(server.url) == CONTENT
            assert server.faulty == 4

    def test_no_ranges_no_windows(self, folder: Path) -> None:
        with (
            HttpServer(folder, Faults(ranges=False)) as server,
            pytest.raises(
                StorageError,
                match=r"with the whole file\. Read whole files \(`data\.order: full`, and no `data\.windows`\)",
            ),
        ):
            open_store(server.url, QUICK).read_range("a.bin", 0, 10)

    def test_no_length_is_refused(self, folder: Path) -> None:
        with (
            HttpServer(folder, Faults(ranges=False, length="none")) as server,
            pytest.raises(StorageError, match="does not tell where the file ends"),
        ):
            whole(server.url)

    def test_no_head(self, folder: Path) -> None:
        for faults in (Faults(head=False), Faults(head=False, ranges=False)):
            with HttpServer(folder, faults) as server:
                store = open_store(server.url, QUICK)
                assert store.size("a.bin") == len(CONTENT)
                assert store.size("empty") == 0
                assert store.read("a.bin") == CONTENT
                assert store.read("empty") == b""
                with pytest.raises(MissingFileError):
                    store.size("none")


class TestAddresses:
    def test_query_and_password_go_with_every_file(self, tmp_path: Path) -> None:
        seen: list[tuple[str, str | None]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append((self.path, self.headers["Authorization"]))
                self.send_response(302 if "old" in self.path else 416)
                self.send_header("Location", "/new/deep/a%20b")
                self.send_header("Content-Range", "bytes */0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815  # http.server's name

            def log_message(self, format: str, *args: object) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        store = open_store(f"http://me:p%40ss@127.0.0.1:{server.server_port}/old/?token=x%2Fy", QUICK)
        with pytest.raises(StorageError, match="HTTP status 416"):
            store.read("deep/a b")
        server.shutdown()
        server.server_close()
        assert seen[0] == ("/old/deep/a%20b?token=x%2Fy", "Basic bWU6cEBzcw==")
        assert seen[1][0] == "/new/deep/a%20b"

    def test_proxy_of_the_environment(self, server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "direct.invalid")
        assert open_store("http://behind.invalid/", QUICK).read("a.bin") == CONTENT
        few = QUICK.model_copy(update={"remote": QUICK.remote.model_copy(update={"attempts": 1})})
        with pytest.raises(StorageError, match=r"direct\.invalid/a\.bin: no answer") as caught:
            open_store("http://direct.invalid", few).read("a.bin")
        assert caught.value.transient

    @pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
    def test_certificates(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        certificate = tmp_path / "certificate.pem"
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
        command += " -addext subjectAltName=DNS:localhost"
        files = ["-keyout", certificate, "-out", tmp_path / "only.pem"]
        subprocess.run([*command.split(), *files], check=True, capture_output=True)
        certificate.write_bytes(certificate.read_bytes() + (tmp_path / "only.pem").read_bytes())
        with HttpServer(folder, certificate=certificate) as server:
            with pytest.raises(AccessError, match=r"not trusted .*in SSL_CERT_FILE") as caught:
                open_store(server.url, QUICK).read("a.bin")
            assert not caught.value.transient
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "only.pem"))
            assert open_store(server.url, QUICK).read("a.bin") == CONTENT

    def test_a_file_that_is_a_page(self, server: HttpServer) -> None:
        assert open_store(server.url, QUICK).read("page.html").startswith(b"<html>")


class TestParallel:
    def test_ranges_are_asked_for_together_and_stay_in_order(self, folder: Path) -> None:
        with HttpServer(folder, Faults(latency=0.1)) as server:
            began = time.monotonic()
            assert by_range(server.url) == CONTENT
            # 11 ranges, 4 at a time: 3 rounds of 0.1 s; one after another they would take 1.1 s
            assert time.monotonic() - began < 0.9
            assert server.most_at_once == 4

    def test_reading_ahead_is_bounded(self, server: HttpServer) -> None:
        pieces = open_store(server.url, QUICK).stream("a.bin")
        next(pieces), next(pieces)
        time.sleep(0.2)
        assert server.gets["a.bin"] <= 1 + 1 + 2 * QUICK.remote.parallel

    def test_what_nobody_waits_for_is_not_asked_for_again(self, server: HttpServer) -> None:
        server.plan("a.bin", "ok", "ok", *["error"] * 1000)
        remote = QUICK.remote.model_copy(update={"parallel": 1, "longest_backoff_seconds": 0.02, "attempts": 1000})
        pieces = open_store(server.url, StorageSettings(remote=remote)).stream("a.bin")
        assert next(pieces) + next(pieces) == CONTENT[: 2 * PIECE]
        while server.gets["a.bin"] < 5:
            time.sleep(0.01)
        pieces.close()
        time.sleep(0.1)
        asked = server.gets["a.bin"]
        time.sleep(0.2)
        assert server.gets["a.bin"] == asked


class TestKnownSize:
    """Who knows the size has all ranges asked for at once; a wrong one is still found out."""

    @pytest.mark.parametrize("wrong", [-1, 1, -PIECE, PIECE, 5 * PIECE])
    def test_wrong_size(self, server: HttpServer, wrong: int) -> None:
        store = open_store(server.url, QUICK)
        for _ in range(2):  # the first read learns that the server knows ranges
            to = io.BytesIO()
            with pytest.raises(StorageError, match=rf"{len(CONTENT)} bytes") as caught:
                store.fetch("a.bin", to, len(CONTENT) + wrong)
            assert CONTENT.startswith(to.getvalue())
            assert not caught.value.transient

    def test_no_round_trip_before_the_first_range(self, folder: Path) -> None:
        with HttpServer(folder) as server:
            store = open_store(server.url, QUICK)
            store.read("a.bin")
            server.log.clear()
            assert b"".join(store.stream("a.bin", len(CONTENT))) == CONTENT
            assert len(server.log) == 11


class TestBenchmark:
    def test_command(self) -> None:
        command = [sys.executable, "benchmarks/remote_cost.py", "--megabytes", "4", "--repeats", "1"]
        ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
        result = json.loads(ended.stdout)
        assert result["bytes"] == 4_000_000
        assert not result["lost"]
        assert result["retries"] == result["faulty_answers"]
        assert ended.returncode == int(max(result["ratio"].values()) > result["limit"])


class TestRetries:
    def test_backoff_doubles_is_random_and_bounded(self) -> None:
        """Waits are uniform on [0, min(longest, first * 2^k)]: checked against the bound and the mean."""
        remote = RemoteSettings(first_backoff_seconds=0.5, longest_backoff_seconds=3.0)
        retries = Retries("root", remote)
        for attempt, bound in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (9, 3.0)):
            state = retries_module.tenacity.RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # of no call
            state.attempt_number = attempt
            waits = np.array([retries._wait(state) for _ in range(2000)])
            assert 0 <= waits.min() < 0.05 * bound
            assert 0.95 * bound < waits.max() <= bound
            assert abs(waits.mean() - bound / 2) < 0.05 * bound

    def test_the_first_is_logged_then_rarely(
        self, server: HttpServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(server.url, QUICK)
        server.plan("a.bin", *["error"] * 3)
        with caplog.at_level(logging.WARNING, "headrace.storage"):
            store.read_range("a.bin", 10, 20)
        assert [record.getMessage() for record in caplog.records] == [
            f"{server.url}/a.bin, bytes 10 to 20: HTTP status 503 Service Unavailable (attempt 1 of 5); trying again, "
            "as 1 time(s) so far. Next such line in 60 s at the earliest."
        ]
        monkeypatch.setattr(store._retried, "_next_line", 0.0)
        server.plan("a.bin", "early_close")
        with caplog.at_level(logging.WARNING, "headrace.storage"):
            store.read_range("a.bin", 10, 20)
        assert "broke off" in caplog.messages[1]
        assert "as 4 time(s) so far" in caplog.messages[1]

    def test_a_server_that_asks_for_patience_gets_it(self) -> None:
        retries = Retries("root", RemoteSettings(first_backoff_seconds=0.0, longest_backoff_seconds=0.2))
        calls: list[float] = []

        def attempt(until: Deadline) -> None:
            calls.append(time.monotonic())
            if len(calls) == 1:
                raise retries_module.TransientError("busy", retry_after=0.1)
            if len(calls) == 2:
                raise retries_module.TransientError("busy", retry_after=1000.0)

        retries("name", 0, None, attempt)
        assert 0.1 <= calls[1] - calls[0] < 0.2 <= calls[2] - calls[1] < 1
