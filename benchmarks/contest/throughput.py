"""Tokens per second and core into ready batches: all contenders in turns, round after round, on the same sequences."""

from __future__ import annotations

import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .corpus import SEQ_LEN, Corpus
from .environments import interpreter
from .process import WorkerProcess

BATCH = 8
OURS, LIMIT, PLAIN_WEBDATASET = "headrace", "no library", "webdataset"
PLAIN_VARIANT = "blocks"
"""``webdataset`` with its own decoder; the other variant's was made by hand."""
SAME_WORK, LESS_WORK = "boundaries found by all", "boundaries found by ours alone"
OWN_DECODER, BEST_PEER = "webdataset, its own decoder", "best peer"


@dataclass(frozen=True)
class Contender:
    """A line of the table: a library reading one format."""

    label: str
    module: str
    environment: str | None
    reads: str
    variants: tuple[str, ...]
    dataset: str | None = None
    """Below our data set; None: it writes a format of its own."""


CONTENDERS = (
    Contender(
        OURS, "headrace", None, "our tars, CRC32C of every block checked", ("full", "full_unkept", "windowed"), "."
    ),
    Contender(PLAIN_WEBDATASET, "wds", "peers", "our tars", ("blocks", "blocks_frombuffer"), "shards"),
    Contender("webdataset json.gz", "wds", "peers", "tars of .json.gz, a sequence each (open_lm)", ("json_gz",)),
    Contender("mosaicml-streaming", "mosaic", "mosaic", "MDS, a sequence a sample", ("mds", "mds_filled")),
    Contender("litdata", "lit", "peers", "chunks of tokens (TokensLoader)", ("tokens", "tokens_torch")),
    Contender("megatron-energon", "energon", "peers", "tars of .npy, a sequence each", ("npy", "npy_frombuffer")),
    Contender("datasets, map-style", "huggingface", "peers", "Arrow", ("map_numpy", "map_arrow")),
    Contender("datasets, iterable", "huggingface", "peers", "Arrow", ("iterable_numpy", "iterable_arrow")),
    Contender(LIMIT, "memmap", None, "one mapped array, nothing checked", ("limit",)),
)


@dataclass
class _Running:
    contender: Contender
    process: WorkerProcess
    version: str
    disk_bytes: int
    figures: dict[tuple[str, bool], list[dict[str, float]]] = field(default_factory=dict)


def measure_throughput(corpus: Corpus, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Every contender's every variant for ``seconds`` in each of the rounds.

    Returns:
        ``rows``: per contender, variant and whether boundaries were looked for: tokens per second of CPU time (all
        threads of the process) and of wall-clock time (on one core), as medians over the rounds with the extremes.
    """
    dataset = folder / "dataset"
    _copy(corpus.dataset, dataset)
    running = [_start(contender, corpus, dataset, folder) for contender in CONTENDERS]
    try:
        checks = {(one.contender.label, name): _check(one, name, corpus) for one in running for name in _variants(one)}
        for number in range(rounds):
            for one in [*running[number % len(running) :], *running[: number % len(running)]]:
                for variant in _variants(one):
                    for scan in (False, True) if one.contender.label not in (OURS, LIMIT) else (False,):
                        answer = one.process.ask("measure", variant=variant, seconds=seconds, scan=scan)
                        one.figures.setdefault((variant, scan), []).append(answer)
            print(f"throughput: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for one in running:
            one.process.close()
    rows = [
        _row(one, variant, scan, checks[one.contender.label, variant])
        for one in running
        for variant, scan in one.figures
    ]
    return {
        "batch": BATCH,
        "seq_len": SEQ_LEN,
        "rounds": rounds,
        "seconds_each": seconds,
        "rows": rows,
        "against": _ratios(rows),
    }


def _variants(one: _Running) -> tuple[str, ...]:
    return one.contender.variants


def _copy(source: Path, target: Path) -> None:
    """Copy a data set, each file in one piece: what has lain in the page cache for long, or was written piece by piece,
    is read more slowly than what was just written, as the peers' formats are."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def _start(contender: Contender, corpus: Corpus, dataset: Path, folder: Path) -> _Running:
    python = Path(sys.executable) if contender.environment is None else interpreter(contender.environment)
    own = folder / contender.label.replace(" ", "_").replace(",", "")
    data = own if contender.dataset is None else dataset / contender.dataset
    log = folder / f"{own.name}.log"
    process = WorkerProcess(python, contender.module, data, SEQ_LEN, corpus.eos_id, log)
    version = process.ask("hello")["version"]
    if contender.dataset is None:
        shutil.rmtree(own, ignore_errors=True)
        process.ask("write", rows=str(corpus.rows))
    disk_bytes = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    return _Running(contender, process, version, disk_bytes)


def _check(one: _Running, variant: str, corpus: Corpus) -> dict[str, Any]:
    """An epoch that isn't timed: the right rows, and the page cache warm.

    Raises:
        RuntimeError: a row that is none of the sequences.
    """
    one.process.ask("open", variant=variant, batch=BATCH)
    found = one.process.ask("check", variant=variant, rows=str(corpus.rows))
    if found["unknown"]:
        raise RuntimeError(f"{one.contender.label} ({variant}) delivered rows that are not of the corpus: {found}")
    return found


def _row(one: _Running, variant: str, scan: bool, check: dict[str, Any]) -> dict[str, Any]:
    figures = one.figures[variant, scan]
    by_cpu = [figure["tokens"] / figure["cpu"] for figure in figures]
    by_wall = [figure["tokens"] / figure["wall"] for figure in figures]
    return {
        "system": one.contender.label,
        "version": one.version,
        "reads": one.contender.reads,
        "variant": variant,
        "boundaries": scan or one.contender.label == OURS,
        "tokens_per_cpu_second": statistics.median(by_cpu),
        "tokens_per_cpu_second_range": [min(by_cpu), max(by_cpu)],
        "tokens_per_wall_second": statistics.median(by_wall),
        "rss_mb": max(figure["rss"] for figure in figures) / 1e6,
        "disk_bytes": one.disk_bytes,
        "epoch": check,
    }


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours against each system's fastest variant: where it finds boundaries as well, and where it may leave that."""
    ours = {row["variant"]: row for row in rows if row["system"] == OURS}
    peers = [row for row in rows if row["system"] not in (OURS, LIMIT)]
    found = {}
    for work, those in ((SAME_WORK, [row for row in peers if row["boundaries"]]), (LESS_WORK, peers)):
        best = {row["system"]: row for row in sorted(those, key=_speed)}
        best[OWN_DECODER] = max((row for row in those if _is_plain(row)), key=_speed)
        best[BEST_PEER] = best_peer = max(those, key=_speed)
        best[LIMIT] = max((row for row in rows if row["system"] == LIMIT), key=_speed)
        found[work] = {
            "best_peer": f"{best_peer['system']} ({best_peer['variant']})",
            "ratios": {
                mode: {over: _speed(mine) / _speed(row) for over, row in best.items()} for mode, mine in ours.items()
            },
        }
    return found


def _is_plain(row: dict[str, Any]) -> bool:
    return row["system"] == PLAIN_WEBDATASET and row["variant"] == PLAIN_VARIANT


def _speed(row: dict[str, Any]) -> float:
    return float(row["tokens_per_cpu_second"])
