"""How well loaders mix a corpus that lies sorted on the disk: the first 512 batches of an epoch.

    python benchmarks/shuffle_quality.py [--save]

2^24 sequences in 16,384 shards, batches of 1,024, 64 workers. A sequence's value is its place in the sorted corpus:
think of its topic, or its date. The mean values of perfectly drawn batches spread as those of 1,024 independent draws
do; the table says by how much more they spread (1 = independent draws, less = more even than that), the same for 32
batches in a row, which is what a learning curve shows as drift, and how many shards a batch comes from.

Where the order comes from is said in each row: Headrace's is its own `Order`; mosaicml-streaming's is its own shuffling
and partitioning code (two modules of its wheel, fetched once into the benchmarks' cache); webdataset's is its own
buffer shuffle over our statement of its splitting; the others are statements of their algorithms after their source.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import webdataset
from contest.environments import LOCKS, cache_folder
from webdataset.filters import _shuffle as webdataset_shuffle

from data_pipeline import Order, OrderSource
from data_pipeline.permutation import IntArray
from data_pipeline.windows import Windows

SEQUENCES, SHARDS, BATCH, WORKERS, BATCHES, SEED = 1 << 24, 16_384, 1024, 64, 512, 0
PER_SHARD, PER_WORKER = SEQUENCES // SHARDS, BATCH // WORKERS
OURS, RESTATED = "Headrace", "re-statement"


def headrace(strata: int = 0, window: int = 0) -> IntArray:
    source = OrderSource("sorted", SEQUENCES)
    windows = Windows(strata, window) if strata else None
    order = Order(SEED, [source], (), "windowed" if windows else "full", windows)
    return order.locate(0, BATCHES * BATCH).sequence.reshape(BATCHES, BATCH)


def no_shuffle() -> IntArray:
    return np.arange(BATCHES * BATCH).reshape(BATCHES, BATCH)


def full_permutation() -> IntArray:
    """OLMo-core: all indices shuffled in memory once an epoch (data/data_loader.py, `build_global_indices`)."""
    indices = np.arange(SEQUENCES, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(SEED)).shuffle(indices)
    return indices[: BATCHES * BATCH].astype(np.int64).reshape(BATCHES, BATCH)


def by_worker(stream: Callable[[int], Iterator[int]]) -> IntArray:
    """Batches to which each worker adds the next sequences of its stream."""
    each = [list(itertools.islice(stream(worker), BATCHES * PER_WORKER)) for worker in range(WORKERS)]
    return np.array(each).reshape(WORKERS, BATCHES, PER_WORKER).transpose(1, 0, 2).reshape(BATCHES, BATCH)


def read_shards(shards: Iterator[int]) -> Iterator[int]:
    return (sequence for shard in shards for sequence in range(shard * PER_SHARD, (shard + 1) * PER_SHARD))


def striped_shards() -> IntArray:
    """open_lm without resampling: every worker reads every 64th shard from its start to its end."""
    return by_worker(lambda worker: read_shards(iter(range(worker, SHARDS, WORKERS))))


def buffered(samples: int) -> IntArray:
    """webdataset: shards split over workers, shard shuffle of 100, a sample buffer that fills to ``samples``."""

    def stream(worker: int) -> Iterator[int]:
        shards = webdataset_shuffle(iter(range(worker, SHARDS, WORKERS)), 100, rng=random.Random(SEED))
        return webdataset_shuffle(read_shards(shards), samples, rng=random.Random(worker))

    return by_worker(stream)


def energon() -> IntArray:
    """A contiguous range for each worker, its slices shuffled, 16 of them open at a time, a buffer of 1,000."""

    def stream(worker: int) -> Iterator[int]:
        draw = random.Random(worker)
        slices = list(range(worker * SHARDS // WORKERS, (worker + 1) * SHARDS // WORKERS))
        draw.shuffle(slices)
        waiting = iter(slices)
        opened = [read_shards(iter([one])) for one in itertools.islice(waiting, 16)]

        def mixed() -> Iterator[int]:
            while opened:
                number = draw.randrange(len(opened))
                for sequence in opened[number]:
                    yield sequence
                    break
                else:
                    opened[number : number + 1] = [read_shards(iter([one])) for one in itertools.islice(waiting, 1)]

        return webdataset_shuffle(mixed(), 1000, initial=1000, rng=draw)

    return by_worker(stream)


def mosaic(algorithm: str) -> IntArray:
    """8 canonical nodes on 8 nodes of 8 ranks, one worker each, the default block of max(4,000,000 / 8, 2^18)."""
    partition = importlib.import_module("streaming.base.partition").get_partitions(
        "orig", SEQUENCES, 8, 8, WORKERS // 8, 1, PER_WORKER
    )
    shuffle = importlib.import_module("streaming.base.shuffle").get_shuffle(
        algorithm, np.full(SHARDS, PER_SHARD), 8, 9176, 0, max(4_000_000 // 8, 1 << 18)
    )
    places = partition[:, :, 0, :BATCHES].transpose(2, 0, 1, 3).reshape(BATCHES, BATCH)
    return np.asarray(shuffle[places], np.int64)


def prepare_mosaic() -> str:
    """Make mosaicml-streaming's order importable without the cloud libraries its package imports; its version."""
    found = re.search(r"^mosaicml-streaming==(\S+)$", LOCKS["mosaic"].read_text(), re.MULTILINE)
    assert found is not None
    folder = cache_folder() / f"mosaicml-streaming-{found[1]}"
    if not (folder / "streaming").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), f"mosaicml-streaming=={found[1]}"], check=True)
    for name in ("streaming", "streaming.base"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    return found[1]


def spread(batches: IntArray, together: int) -> float:
    """Root mean square distance of the mean value of ``together`` batches from the corpus', over independent draws'."""
    means = ((batches + 0.5) / SEQUENCES).reshape(-1, together * BATCH).mean(axis=1)
    return float(np.sqrt(np.mean((means - 0.5) ** 2) * 12 * together * BATCH))


def measure() -> dict[str, Any]:
    mosaic_code = f"mosaicml-streaming {prepare_mosaic()}"
    buffer_code = f"webdataset {webdataset.__version__}, splitting restated"
    schemes: list[tuple[str, str, Callable[[], IntArray]]] = [
        ("no shuffle", RESTATED, no_shuffle),
        ("striped shards (open_lm)", RESTATED, striped_shards),
        ("webdataset, shards 100, buffer 1000", buffer_code, lambda: buffered(1000)),
        ("webdataset, shards 100, buffer 10000", buffer_code, lambda: buffered(10_000)),
        ("Mosaic py1s", mosaic_code, lambda: mosaic("py1s")),
        ("Mosaic py1br", mosaic_code, lambda: mosaic("py1br")),
        ("Mosaic py1e", mosaic_code, lambda: mosaic("py1e")),
        ("full permutation (OLMo-core)", RESTATED, full_permutation),
        ("Energon", RESTATED, energon),
        ("full", OURS, headrace),
    ]
    for strata, window in ((64, 1024), (256, 1024), (1024, 128), (1024, 1024), (4096, 1024)):
        name = f"windowed, {strata} strata, windows of {window}"
        schemes.append((name, OURS, lambda strata=strata, window=window: headrace(strata, window)))
    rows = []
    for name, code, order in schemes:
        began = time.process_time()
        batches = order()
        seconds = time.process_time() - began
        assert len(np.unique(batches)) == batches.size, f"{name} repeats a sequence within the epoch"
        shards = float(np.mean([len(np.unique(batch // PER_SHARD)) for batch in batches]))
        rows.append(
            {
                "scheme": name,
                "code": code,
                "batch": round(spread(batches, 1), 3),
                "batches_32": round(spread(batches, 32), 3),
                "shards_per_batch": round(shards, 1),
                "cpu_seconds": round(seconds, 3),
            }
        )
    return {
        "sequences": SEQUENCES,
        "shards": SHARDS,
        "batch": BATCH,
        "workers": WORKERS,
        "batches": BATCHES,
        "independent_draws_shards_per_batch": round(SHARDS * (1 - math.exp(BATCH * math.log1p(-1 / SHARDS))), 1),
        "rows": rows,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "numpy": np.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/shuffle_quality.json")
    arguments = parser.parse_args()
    result = measure()
    print(f"{'':44}{'batch':>8}{'32 batches':>12}{'shards':>8}{'CPU s':>9}  code")
    for row in result["rows"]:
        figures = f"{row['batch']:8.2f}{row['batches_32']:12.2f}{row['shards_per_batch']:8.0f}{row['cpu_seconds']:9.2f}"
        print(f"{row['scheme']:44}{figures}  {row['code']}")
    if arguments.save:
        path = Path(__file__).parent / "results/shuffle_quality.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
