"""Headrace: the loader of a training run as it is, one rank, no thread; every block's CRC32C is checked in every epoch.

What is called an epoch here is a stretch of one run, as long as an epoch. It opens its source anew, so that no block
passes as checked before; what the loader keeps in memory is forgotten, but the memory itself stays, as it does over a
run. Document boundaries come with the batch. ``full_unkept`` keeps nothing in memory: how fast the order ``full`` is on
a data set that is many times as large as what a loader keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline import BatchPlan, Order, OrderSource, StepLoader, TokenSource
from data_pipeline.block_memory import BlockMemory
from data_pipeline.windows import Windows

VERSION = "this checkout"
SKIP = 0

_WINDOW = 256
"""Sequences: 16 blocks of 65,536 tokens, 2 MB."""

Batch = tuple[torch.Tensor, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]


def write(rows: npt.NDArray[np.uint16], folder: Path) -> None:
    """Nothing: ours is the data set that the others were written from."""


def _open(windowed: bool, keep: bool, folder: Path, batch: int, seq_len: int) -> Epoch:
    memory = BlockMemory() if keep else BlockMemory(0)
    with TokenSource(folder, None, "train", seq_len) as source:
        steps, sources = source.sequences // batch, [OrderSource("text", source.sequences)]
    order = Order(1, sources, mode="windowed", windows=Windows(batch, _WINDOW)) if windowed else Order(1, sources)

    def epoch(number: int) -> Iterator[Batch]:
        source = TokenSource(folder, None, "train", seq_len)
        loader = StepLoader(
            order,
            [source],
            rank=0,
            world_size=1,
            micro_batch=batch,
            plan=BatchPlan(batch),
            seq_len=seq_len,
            start_step=number * steps,
            start_position=number * steps * batch,
            end_step=(number + 1) * steps,
            prefetch=0,
            memory=memory,
        )
        return _batches(loader, source)

    return epoch


def _batches(loader: StepLoader, source: TokenSource) -> Iterator[Batch]:
    with source:
        for step in loader:
            (made,) = step.micro_batches
            yield made.tokens, made.labels


VARIANTS = {
    "full": partial(_open, False, True),
    "full_unkept": partial(_open, False, False),
    "windowed": partial(_open, True, True),
}
