"""What a ready batch of [8, 4096] costs, part by part, on one core: microseconds of CPU time, and what they bound.

    python benchmarks/batch_limits.py

On the text of `benchmarks/data.py`, order ``full``, page cache warm, every block read and checked once an epoch:

- whole: the loader as it is, opened anew for each epoch;
- python: the same with a kernel that does nothing: no byte is read, checked, widened or looked at;
- read: the blocks of an epoch from the page cache, their CRC32C included, by the kernel in one call a shard;
- widen: the rows of an epoch from anywhere in memory into batches that are used again, by the kernel alone.

If Python cost nothing, a batch would cost `read` and `widen`; if the kernel did, `python`. Medians of several epochs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from contest.contenders.headrace import VARIANTS
from contest.corpus import SEQ_LEN, make_corpus
from contest.environments import cache_folder
from contest.throughput import BATCH

from data_pipeline import TokenSource, checked_blocks, step_reader
from data_pipeline.kernel import describe, load
from data_pipeline.layout import shard_path
from data_pipeline.recycled import Room
from data_pipeline.rows import Part, Rows

EPOCHS = 15


class Nothing:
    """A kernel that does nothing, and says that it has."""

    def read(self, descriptor: int, offsets: Any, *rest: Any) -> int:
        return len(offsets)

    def widen(self, rows: Rows, eos_id: int, samples: Any, size: int) -> Callable[..., Any]:
        rows.addresses()
        ends = np.zeros(2, np.int32)
        return lambda number, room: (ends[:], True)


def epochs_of(kernel: Any, dataset: Path) -> list[float]:
    """CPU seconds a batch of each epoch."""
    # in place of the loader's own, whatever its type: what is measured is the pipeline around it
    checked_blocks.load = step_reader.load = lambda: kernel  # type: ignore[assignment]
    epoch = VARIANTS["full"](dataset, BATCH, SEQ_LEN)
    seconds = []
    for number in range(1, EPOCHS + 1):
        batches = epoch(number)
        began = time.process_time()
        count = sum(1 for _ in batches)
        seconds.append((time.process_time() - began) / count)
    return seconds


def kernel_alone(dataset: Path) -> dict[str, list[float]]:
    """CPU seconds a batch of reading, and of widening."""
    kernel, seconds = load(), {"read": [], "widen": []}
    with TokenSource(dataset, None, "train", SEQ_LEN) as source:
        layout, eos_id, batches = source.manifest.layout, source.eos_id, source.sequences // BATCH
        blocks = source.shards.blocks.tolist()
        expected = [source._files.checksums(shard, 0) for shard in range(len(blocks))]
        files = [os.open(shard_path(dataset, name), os.O_RDONLY) for name in source.shards.names]
    room, at = np.empty((sum(blocks), -(-layout.block_bytes // 64) * 64), np.uint8), np.zeros(1, np.int64)
    item = layout.token_bytes
    shape, strides = (len(room), layout.block_tokens // SEQ_LEN, SEQ_LEN + 1), (room.strides[0], SEQ_LEN * item, item)
    tokens = np.ndarray(shape, layout.token_dtype, room, 0, strides)
    rooms = [Room((BATCH, SEQ_LEN + 1)) for _ in range(2)]
    for number in range(EPOCHS):
        began, first = time.process_time(), 0
        for file, count, crcs in zip(files, blocks, expected, strict=True):
            offsets = layout.data_offset(0) + np.arange(count) * layout.member_stride
            assert kernel.read(file, offsets, room, first + np.arange(count), layout.block_bytes, crcs, at) == count
            first += count
        seconds["read"].append((time.process_time() - began) / batches)
        which = np.random.default_rng(number).permutation(len(room) * shape[1])[: batches * BATCH]
        rows = Rows(len(which), [Part(slice(None), tokens, (which // shape[1], which % shape[1]))])
        widen = kernel.widen(rows, eos_id, np.arange(len(which)), BATCH)
        began = time.process_time()
        for batch in range(batches):
            widen(batch, rooms[batch & 1])
        seconds["widen"].append((time.process_time() - began) / batches)
    return seconds


def main() -> None:
    """Measure and print."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    folder = cache_folder() / "data"
    corpus = make_corpus(folder / "corpus-128", 128 << 20)
    copied = folder / "limits"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(corpus.dataset, copied)  # what was just written is read from the page cache in larger pieces
    made = kernel_alone(copied)
    made["whole"], made["python"] = epochs_of(load(), copied), epochs_of(Nothing(), copied)
    shutil.rmtree(copied)
    print(f"batches are made by {describe()}; load average {os.getloadavg()[0]:.1f}")
    for name in ("whole", "python", "read", "widen"):
        middle = statistics.median(made[name])
        print(f"{name:8s} {1e6 * middle:6.1f} us a batch = {BATCH * SEQ_LEN / middle / 1e6:6.0f} M tokens/s", end="")
        print(f"   ({1e6 * min(made[name]):.1f} to {1e6 * max(made[name]):.1f} us)")


if __name__ == "__main__":
    main()
