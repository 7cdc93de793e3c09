"""One contender in a process of its own: reads a JSON request a line, answers with a JSON object a line.

    python -m contest.worker CONTENDER FOLDER SEQ_LEN EOS_ID

The process is pinned to one core, so that threads of a library share it with the reading itself: wall-clock time is
time of one core.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch

Batch = tuple[torch.Tensor, torch.Tensor]


class Worker:
    """A contender's variants, opened, and what is asked of them."""

    def __init__(self, contender: str, folder: Path, seq_len: int, eos_id: int) -> None:
        self._module = importlib.import_module(f".contenders.{contender}", __package__)
        self._folder, self._seq_len, self._eos_id = folder, seq_len, eos_id
        self._opened: dict[str, Callable[[int], Iterator[Batch]]] = {}
        self._epochs = 0

    def hello(self) -> dict[str, Any]:
        """What the contender is."""
        return {"version": self._module.VERSION, "variants": list(self._module.VARIANTS)}

    def write(self, rows: str) -> dict[str, Any]:
        """Write the sequences in the contender's format."""
        self._folder.mkdir(parents=True)
        self._module.write(np.load(rows), self._folder)
        return {"bytes": sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())}

    def open(self, variant: str, batch: int) -> dict[str, Any]:
        """Open the data set, not yet an epoch of it."""
        self._opened[variant] = self._module.VARIANTS[variant](self._folder, batch, self._seq_len)
        return {"rss": psutil.Process().memory_info().rss}

    def check(self, variant: str, rows: str) -> dict[str, Any]:
        """Read an epoch and hold every row against the sequences it should consist of."""
        expected = {zlib.crc32(row.tobytes()) for row in np.load(rows)}
        seen: list[int] = []
        filling = 0
        for tokens, labels in self._next_epoch(variant):
            assert tokens.dtype == labels.dtype == torch.int64, (tokens.dtype, labels.dtype)
            assert tokens.shape[1] == labels.shape[1] == self._seq_len, (tokens.shape, labels.shape)
            whole = torch.cat([tokens, labels[:, -1:]], dim=1).numpy().astype(np.uint16)
            empty = (whole == self._eos_id).all(axis=1)
            filling += int(empty.sum())
            seen += [zlib.crc32(row.tobytes()) for row in whole[~empty]]
        found = set(seen)
        return {"rows": len(seen), "distinct": len(found), "unknown": len(found - expected), "filling": filling}

    def measure(self, variant: str, seconds: float, scan: bool) -> dict[str, Any]:
        """Read whole epochs until ``seconds`` are over; the contender's first ``SKIP`` batches of each are not counted.

        Args:
            variant: of the contender.
            seconds: to measure, at least.
            scan: look for document boundaries in every batch, as ours does.
        """
        tokens = 0
        wall = cpu = 0.0
        while wall < seconds:
            batches = self._next_epoch(variant)
            for _ in range(self._module.SKIP):
                next(batches)
            began, began_cpu = time.perf_counter(), time.process_time()
            for inputs, _ in batches:
                tokens += inputs.numel()
                if scan:
                    np.flatnonzero(inputs.numpy() == self._eos_id)
            wall += time.perf_counter() - began
            cpu += time.process_time() - began_cpu
        return {"tokens": tokens, "wall": wall, "cpu": cpu, "rss": psutil.Process().memory_info().rss}

    def _next_epoch(self, variant: str) -> Iterator[Batch]:
        self._epochs += 1
        return iter(self._opened[variant](self._epochs))


def main() -> None:
    """Serve until the input ends."""
    contender, folder, seq_len, eos_id = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries talk
    worker = Worker(contender, Path(folder), int(seq_len), int(eos_id))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(worker, request.pop("do"))(**request)), file=answers)


if __name__ == "__main__":
    main()
