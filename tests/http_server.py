"""A local http server over a folder, with byte ranges, and with the faults of real ones on request.

In a test::

    with HttpServer(folder) as server:
        server.plan("a.bin", "error", "ok", "early_close")    # the first three GETs of a.bin; then as usual
        open_store(server.url).read("a.bin")
        assert server.gets["a.bin"] == 2

As a process of its own (prints its address, then serves until its input ends)::

    python tests/http_server.py FOLDER --latency 0.05 --error-rate 0.01 --early-close-rate 0.01 --bandwidth 100e6

Faults, all of GET requests: ``error`` (503), any status number, ``early_close`` (half the body, then the end),
``reset`` (half the body, then RST), ``stall`` (half the body, then silence), ``ignore_range`` (200 and all of it),
``short_range`` (206 for half of the range, honestly announced), ``wrong_range`` (206 for a range one byte on),
``lying_range`` (206 that claims the range and holds one byte less), ``html`` (a web page with status 200), ``ok``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

PIECE = 2**18
PAGE = b"<html><body>Please sign in.</body></html>"


@dataclass(frozen=True)
class Faults:
    """What goes wrong with every request, or with a seeded share of them."""

    latency: float = 0.0  # seconds before an answer
    error_rate: float = 0.0  # share of GETs answered with 503
    early_close_rate: float = 0.0  # share of GETs whose connection ends in mid-body
    ranges: bool = True  # whether byte ranges are known
    head: bool = True  # whether HEAD is allowed
    length: str = "known"  # "chunked": no Content-Length; "none": neither length nor chunks
    bandwidth: float = 0.0  # bytes per second of all connections together; 0: no limit
    seed: int = 0


class HttpServer:
    """Serves ``folder`` from threads of this process.

    Attributes:
        url: its address (https with a ``certificate``, a PEM file of key and certificate).
        gets: GET requests per path so far. log: (method, path, Range header) of every request.
        faulty: how many answers were spoilt. most_at_once: requests that were being answered at one time.
    """

    def __init__(
        self, folder: Path, faults: Faults | None = None, port: int = 0, certificate: Path | None = None
    ) -> None:
        self.folder, self.faults = Path(folder), faults or Faults()
        self.gets: Counter[str] = Counter()
        self.faulty = self.at_once = self.most_at_once = 0
        self.log: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self._plans: defaultdict[str, deque[str]] = defaultdict(deque)
        self._random = random.Random(self.faults.seed)
        self._link_free = 0.0
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def plan(self, path: str, *faults: str) -> None:
        """The faults of the next GETs of ``path``, one each."""
        self._plans[path].extend(faults)

    def __enter__(self) -> HttpServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, path: str) -> str:
        """What is to go wrong with this GET."""
        with self.lock:
            self.gets[path] += 1
            drawn = self._random.random()
            fault = "ok"
            if self._plans[path]:
                fault = self._plans[path].popleft()
            elif drawn < self.faults.error_rate:
                fault = "error"
            elif drawn < self.faults.error_rate + self.faults.early_close_rate:
                fault = "early_close"
            self.faulty += fault != "ok"
            return fault

    def wait_for_link(self, size: int) -> None:
        """Sleep until ``size`` more bytes have had their turn on the link that all connections share."""
        if not self.faults.bandwidth:
            return
        with self.lock:
            # a link that was idle for a moment has a buffer's worth of credit; without, every oversleep would be lost
            self._link_free = max(self._link_free, time.monotonic() - 0.02) + size / self.faults.bandwidth
            pause = self._link_free - time.monotonic()
        # short waits would oversleep; the debt is kept in the link's clock
        if pause > 0.002:
            time.sleep(pause)


class _Server(ThreadingHTTPServer):
    owner: HttpServer
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 2**16

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the owner keeps a log."""

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        owner: HttpServer = self.server.owner  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path).lstrip("/")
        with owner.lock:
            owner.log.append((method, path, self.headers.get("Range")))
            owner.at_once += 1
            owner.most_at_once = max(owner.most_at_once, owner.at_once)
        try:
            self._respond(owner, path, method)
        finally:
            with owner.lock:
                owner.at_once -= 1

    def _respond(self, owner: HttpServer, path: str, method: str) -> None:
        if owner.faults.latency:
            time.sleep(owner.faults.latency)
        if method == "HEAD" and not owner.faults.head:
            return self._plain(405, b"")
        fault = owner.next_fault(path) if method == "GET" else "ok"
        if fault == "html":
            return self._plain(200, PAGE, "text/html; charset=utf-8")
        if fault == "error" or fault.isdecimal():
            return self._plain(503 if fault == "error" else int(fault), b"not now")
        file = owner.folder / path
        if not file.is_file():
            return self._plain(404, b"no such file")
        return self._file(owner, file, method, fault)

    def _plain(self, status: int, content: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _file(self, owner: HttpServer, file: Path, method: str, fault: str) -> None:
        status = file.stat()
        size, start, stop = status.st_size, 0, status.st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if owner.faults.ranges else None
        if asked and fault != "ignore_range":
            start, stop = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            stop = start + (stop - start) // 2 if fault == "short_range" else stop
            start, stop = (start + 1, min(stop + 1, size)) if fault == "wrong_range" else (start, stop)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            stop -= fault == "lying_range"
        else:
            self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("ETag", f'"{status.st_mtime_ns:x}-{size:x}"')
        if owner.faults.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if owner.faults.length == "known":
            self.send_header("Content-Length", str(stop - start))
        elif owner.faults.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        self.end_headers()
        if method == "GET":
            self._body(owner, file, start, stop, fault)
        return None

    def _body(self, owner: HttpServer, file: Path, start: int, stop: int, fault: str) -> None:
        chunked = owner.faults.length == "chunked"
        end = start + (stop - start) // 2 if fault in ("early_close", "reset", "stall") else stop
        with file.open("rb") as content:
            content.seek(start)
            while start < end:
                piece = content.read(min(PIECE, end - start))
                owner.wait_for_link(len(piece))
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                start += len(piece)
        if chunked and end == stop:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        if end == stop:
            return
        self.close_connection = True
        if fault == "stall":
            owner.stopping.wait(60)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def main() -> None:
    """Serve until standard input ends; then print what was counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name in ("latency", "error-rate", "early-close-rate", "bandwidth"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    settings = vars(parser.parse_args())
    folder = settings.pop("folder")
    with HttpServer(folder, Faults(**settings)) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(json.dumps({"gets": sum(server.gets.values()), "faulty": server.faulty}), flush=True)


if __name__ == "__main__":
    main()
