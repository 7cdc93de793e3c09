"""What reading through a slow and failing http server costs over the transfer's own time.

    python benchmarks/remote_cost.py [--megabytes 400] [--bandwidth 100e6] [--save]

The same files twice over the same link (a local server in a process of its own that hands out ``bandwidth`` bytes per
second in all): once plainly, one request a file over one connection from a server without latency or faults; once by
our store, from a server that waits 50 ms before every answer, answers 1 % of the requests with 503 and breaks 1 % off
in mid-body. ``whole``: shard after shard of 200 MB, as into the node's cache. ``windows``: 8 MB ranges in random order,
some read ahead, as the windowed order does. The bytes are compared by SHA-256. Limit (exit code 1 beyond it): 1.2x.

Without a limit of the link (``--bandwidth 0``) it measures the machine's loopback and Python, not a network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3

from data_pipeline.storage import Store, open_store

SERVER = Path(__file__).resolve().parent.parent / "tests" / "http_server.py"
RESULTS = Path(__file__).resolve().parent / "results" / "remote_cost.json"
FAULTS = {"latency": 0.05, "error-rate": 0.01, "early-close-rate": 0.01}
FILES, WINDOW, AHEAD = 2, 2**23, 8
LIMIT = 1.2


@contextmanager
def serving(folder: Path, **settings: float) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    """The address of a server process over ``folder``, and a function that ends it and returns what it counted."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    server = subprocess.Popen(
        [sys.executable, SERVER, folder, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip(), lambda: json.loads(server.communicate(timeout=30)[0])
    finally:
        server.kill()
        server.wait()


def write_files(folder: Path, size: int) -> dict[str, bytes]:
    """``FILES`` files of ``size`` random bytes each, and the SHA-256 of each."""
    hashes = {}
    for number in range(FILES):
        content = random.Random(number).randbytes(size)
        (folder / f"{number:06d}.tar").write_bytes(content)
        hashes[f"{number:06d}.tar"] = hashlib.sha256(content).digest()
    return hashes


def digests(pieces: Iterable[tuple[str, bytes]]) -> tuple[float, dict[str, bytes]]:
    """Seconds until all pieces of all files had come, and the SHA-256 of each file. Hashing is not counted."""
    found: dict[str, list[bytes]] = {}
    began = time.perf_counter()
    for name, content in pieces:
        found.setdefault(name, []).append(content)
    seconds = time.perf_counter() - began
    return seconds, {name: hashlib.sha256(b"".join(parts)).digest() for name, parts in found.items()}


def plain(url: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Every file by one request over one connection."""
    with urllib3.PoolManager(1) as pool:
        for name in names:
            answer = pool.request("GET", f"{url}/{name}", preload_content=False)
            while piece := answer.read(2**20):
                yield name, piece
            answer.release_conn()


def whole(store: Store, sizes: dict[str, int]) -> Iterator[tuple[str, bytes]]:
    """Shard after shard."""
    for name, size in sizes.items():
        for piece in store.stream(name, size):
            yield name, piece


def windows(store: Store, sizes: dict[str, int]) -> Iterator[tuple[str, bytes]]:
    """Windows in random order, ``AHEAD`` of them on their way; handed on in file order for the comparison."""
    ranges = [
        (name, start, min(start + WINDOW, size)) for name, size in sizes.items() for start in range(0, size, WINDOW)
    ]
    shuffled = random.Random(0).sample(ranges, len(ranges))
    with ThreadPoolExecutor(AHEAD) as pool:
        contents = dict(zip(shuffled, pool.map(lambda wanted: store.read_range(*wanted), shuffled), strict=True))
    for wanted in ranges:
        yield wanted[0], contents[wanted]


def measure(megabytes: int = 400, bandwidth: float = 100e6, repeats: int = 3) -> dict[str, Any]:
    """Seconds of each way of reading (medians), their ratios to the plain transfer, and whether anything was lost."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        hashes = write_files(folder, megabytes * 10**6 // FILES)
        sizes = {name: (folder / name).stat().st_size for name in hashes}
        seconds: dict[str, list[float]] = {"plain": [], "whole": [], "windows": []}
        retries = faulty = 0
        lost = False
        # taking turns, so that whatever else the machine does falls on all alike
        for repeat in range(repeats):
            with serving(folder, bandwidth=bandwidth) as (url, _):
                taken, found = digests(plain(url, sizes))
                seconds["plain"].append(taken)
                lost |= found != hashes
            for name, way in (("whole", whole), ("windows", windows)):
                with serving(folder, bandwidth=bandwidth, seed=repeat, **FAULTS) as (url, counted):
                    store = open_store(url)
                    taken, found = digests(way(store, sizes))
                    seconds[name].append(taken)
                    lost |= found != hashes
                    retries += store.retries
                    faulty += counted()["faulty"]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "bytes": sum(sizes.values()),
        "bandwidth": bandwidth,
        "faults": FAULTS,
        "seconds": {name: [round(time, 3) for time in times] for name, times in seconds.items()},
        "ratio": {name: round(medians[name] / medians["plain"], 3) for name in ("whole", "windows")},
        "limit": LIMIT,
        "faulty_answers": faulty,
        "retries": retries,
        "lost": lost,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }


def main() -> int:
    """Measure, print, and compare with the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--bandwidth", type=float, default=100e6, help="bytes per second of the link; 0: no limit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/remote_cost.json")
    options = parser.parse_args()
    result = measure(options.megabytes, options.bandwidth, options.repeats)
    print(json.dumps(result, indent=2))
    if options.save:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return int(result["lost"] or max(result["ratio"].values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
