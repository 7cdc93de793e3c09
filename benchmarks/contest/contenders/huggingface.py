"""HF datasets: one Arrow data set of rows of fixed length, map-style and iterable, shuffled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from .rows import split

VERSION = datasets.__version__
SKIP = 0

_BUFFER = 1000
_SHARDS = 64

Batch = tuple[torch.Tensor, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]


def write(rows: npt.NDArray[np.uint16], folder: Path) -> None:
    """An Arrow data set with the column ``tokens`` of lists of one length."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("uint16"), length=rows.shape[1])})
    datasets.Dataset(pa.table({"tokens": values}), info=datasets.DatasetInfo(features=features)).save_to_disk(folder)


def _batch(batch: Any) -> Batch:
    """From a batch in numpy's or Arrow's format."""
    if isinstance(batch, pa.Table):
        column = batch["tokens"].combine_chunks()
        tokens = column.flatten().to_numpy().reshape(len(column), -1)
    else:
        tokens = batch["tokens"]
    return split(torch.from_numpy(tokens.astype(np.int64)))


def _map_style(form: str, folder: Path, batch: int, seq_len: int) -> Epoch:
    dataset = datasets.load_from_disk(folder)

    def epoch(number: int) -> Iterator[Batch]:
        return map(_batch, dataset.shuffle(seed=number).with_format(form).iter(batch))

    return epoch


def _iterable(form: str, folder: Path, batch: int, seq_len: int) -> Epoch:
    dataset = datasets.load_from_disk(folder).to_iterable_dataset(num_shards=_SHARDS)

    def epoch(number: int) -> Iterator[Batch]:
        shuffled = dataset.shuffle(seed=number, buffer_size=_BUFFER).with_format(form)
        return map(_batch, shuffled.iter(batch))

    return epoch


VARIANTS = {
    f"{style}_{form}": partial(opened, form)
    for style, opened in (("map", _map_style), ("iterable", _iterable))
    for form in ("numpy", "arrow")
}
