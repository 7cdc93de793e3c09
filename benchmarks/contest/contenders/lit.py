"""litdata: optimised chunks of tokens read through its TokensLoader, shuffled, its own DataLoader."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import numpy.typing as npt
import torch
from litdata.streaming.item_loader import TokensLoader
from torch.utils.data import DataLoader

from .rows import batch_of

VERSION = importlib.metadata.version("litdata")
SKIP = 1

_SEQUENCES_PER_CHUNK = 1024

Batch = tuple[torch.Tensor, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]


def _rows_of(path_and_span: tuple[str, int, int]) -> Iterator[npt.NDArray[np.uint16]]:
    path, start, stop = path_and_span
    yield from np.load(path, mmap_mode="r")[start:stop]


def write(rows: npt.NDArray[np.uint16], folder: Path) -> None:
    """Chunks of tokens; sequence after sequence, so that blocks of SEQ_LEN + 1 tokens are our rows."""
    source = folder.parent / "rows_for_litdata.npy"
    np.save(source, rows)
    litdata.optimize(
        fn=_rows_of,
        inputs=[(str(source), 0, len(rows))],
        output_dir=str(folder),
        chunk_size=_SEQUENCES_PER_CHUNK * rows.shape[1],
        num_workers=1,
        item_loader=TokensLoader(block_size=rows.shape[1]),
    )
    source.unlink()


def _open(loader: Any, folder: Path, batch: int, seq_len: int) -> Epoch:
    def epoch(number: int) -> Iterator[Batch]:
        dataset = litdata.StreamingDataset(
            str(folder), item_loader=TokensLoader(block_size=seq_len + 1), shuffle=True, drop_last=False, seed=number
        )
        return iter(loader(dataset, batch_size=batch, collate_fn=batch_of, num_workers=0))

    return epoch


VARIANTS = {"tokens": partial(_open, litdata.StreamingDataLoader), "tokens_torch": partial(_open, DataLoader)}
