"""The data pipeline against its peers and its limits, in one run on one text.

    python benchmarks/data.py                     # everything, about 15 minutes on two cores; writes results/data.*
    python benchmarks/data.py --short             # the same on less text, under two minutes; writes nothing
    python benchmarks/data.py --only throughput scale

The text is Python source code that is on any machine with Headrace: the standard library and the installed packages,
no file twice. Peers run in environments of their own, made on first use (benchmarks/requirements-peers*.txt, 3 GB) in
the cache folder ($HEADRACE_BENCHMARKS, or ~/.cache), where text and data sets stay for the next run as well.

- throughput: tokens per second and core into ready batches (int64 tokens and labels of [8, 4096], document boundaries
  found), shuffled as each library recommends, page cache warm. Each system runs in a process pinned to one core, in
  turns, and each batch's rows were held against the corpus before. Figures are per second of CPU time, all threads of
  the process and the kernel's work for it included, so that what else the machine does weighs less; wall-clock figures
  stand beside them. Peers are taken with a scan for boundaries (the same work) and without (less), our ratios for each.
- scale: 10^5 shards of 10^13 tokens: first batch, cost of the order, resuming far in, memory over many batches.
- prepare: text to tokens on the disk on one core, the same vocabulary.
- shuffle, remote: benchmarks/shuffle_quality.py and benchmarks/remote_cost.py.
- interop: plain webdataset, wids and megatron-energon read our shards with equal tokens (the tests).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import data_report
import remote_cost
import shuffle_quality
from contest.corpus import Corpus, make_corpus
from contest.environments import cache_folder, interpreter
from contest.preparing import measure_prepare
from contest.throughput import measure_throughput
from scale.measure import measure_scale
from scale.remote import measure_remote_epoch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    text_bytes: int
    rounds: int
    seconds_each: float
    shards: int
    batches: int
    repetitions: int
    prepare_bytes: int
    prepare_rounds: int
    remote_megabytes: int
    remote_rounds: int


FULL = Size(128 << 20, 5, 0.6, 100_000, 1_000_000, 5, 16 << 20, 3, 400, 3)
SHORT = Size(16 << 20, 2, 0.05, 10_000, 20_000, 1, 1 << 20, 1, 40, 1)
BANDWIDTH = {"store": 100e6, "reader": 25e6}
"""Bytes per second of the link to the http server: of the test of the store alone, of the one through the loader."""


class Benchmark:
    """The sections; each returns what is kept of it."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.folder = cache_folder() / "data"
        self.folder.mkdir(parents=True, exist_ok=True)

    def corpus(self) -> Corpus:
        """The text, prepared once for all sections and later runs."""
        return make_corpus(self.folder / f"corpus-{self.size.text_bytes >> 20}", self.size.text_bytes)

    def throughput(self) -> dict[str, Any]:
        """Tokens per second into batches, ours and the peers'."""
        corpus = self.corpus()
        work = self.folder / f"formats-{self.size.text_bytes >> 20}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        measured = measure_throughput(corpus, work, self.size.rounds, self.size.seconds_each)
        shutil.rmtree(work)
        text = {"bytes": corpus.text_bytes, "documents": corpus.documents, "tokens": corpus.tokens}
        return {"text": text, **measured}

    def scale(self) -> dict[str, Any]:
        """10^5 shards, 10^13 tokens, 10^6 batches."""
        return measure_scale(self.folder, self.size.shards, self.size.batches, self.size.repetitions)

    def prepare(self) -> dict[str, Any]:
        """Text to tokens, ours and the peers'."""
        return measure_prepare(self.corpus(), self.folder, self.size.prepare_bytes, self.size.prepare_rounds)

    def shuffle(self) -> dict[str, Any]:
        """The table of a sorted corpus."""
        return shuffle_quality.measure()

    def remote(self) -> dict[str, Any]:
        """A slow, failing http server: the store alone, and an epoch of the loader through it."""
        store = remote_cost.measure(self.size.remote_megabytes, BANDWIDTH["store"], self.size.remote_rounds)
        reader = measure_remote_epoch(self.corpus().dataset, BANDWIDTH["reader"], self.size.remote_rounds)
        return {"store": store, "reader": reader}

    def interop(self) -> dict[str, Any]:
        """The interop tests, energon's too."""
        interpreter("peers")
        tests = [f"tests/data_pipeline/test_interop{kind}.py" for kind in ("", "_energon")]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=RESULTS.parent.parent, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout)
        return {"tests": done.stdout.strip().splitlines()[-1]}


SECTIONS: dict[str, Callable[[Benchmark], dict[str, Any]]] = {
    "throughput": Benchmark.throughput,
    "scale": Benchmark.scale,
    "prepare": Benchmark.prepare,
    "shuffle": Benchmark.shuffle,
    "remote": Benchmark.remote,
    "interop": Benchmark.interop,
}


def machine() -> dict[str, Any]:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "sentencepiece", "crc32c")}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
        "load_at_start": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Run what was asked for, print it, and keep it if it is everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="less of everything: does it work")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    arguments = parser.parse_args()
    began = time.perf_counter()
    size = SHORT if arguments.short else FULL
    benchmark = Benchmark(size)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/data.py", *sys.argv[1:]]),
        "machine": machine(),
        "size": asdict(size),
    }
    for name in arguments.only or SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = SECTIONS[name](benchmark)
        (benchmark.folder / "last_run.json").write_text(json.dumps(result, indent=1))  # in case a later one fails
    result["machine"]["load_at_end"] = round(os.getloadavg()[0], 1)
    result["seconds"] = round(time.perf_counter() - began, 1)
    result["targets"] = data_report.targets(result)
    text = data_report.render(result)
    print(text)
    if arguments.short:
        print("So little of everything shows that it works; its figures are mostly overhead.")
    if not (arguments.short or arguments.only):
        (RESULTS / "data.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "data.md").write_text(text)


if __name__ == "__main__":
    main()
