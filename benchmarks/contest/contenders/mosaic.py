"""mosaicml-streaming: MDS shards of one sequence a sample, its default shuffle (py1e), PyTorch's DataLoader."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader
from transformers.models.auto.tokenization_auto import AutoTokenizer  # noqa: F401 - before torchvision is replaced

from .rows import batch_of, split

Batch = tuple[torch.Tensor, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]


def _without_torchvision() -> None:
    """streaming imports its image data sets and they torchvision, of which nothing is used here."""
    for name, has in {
        "torchvision": None,
        "torchvision.datasets": "VisionDataset",
        "torchvision.transforms": None,
        "torchvision.transforms.functional": "to_tensor",
    }.items():
        module = ModuleType(name)
        if has:
            setattr(module, has, type(has, (), {}))
        sys.modules[name] = module


_without_torchvision()
import streaming  # noqa: E402 - looks for torchvision when it is imported
from streaming.base.util import clean_stale_shared_memory  # noqa: E402 - as above

VERSION = streaming.__version__
SKIP = 1


def write(rows: npt.NDArray[np.uint16], folder: Path) -> None:
    """One MDS data set with the tokens as an array of known shape."""
    columns = {"tokens": f"ndarray:uint16:{rows.shape[1]}"}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for row in rows:
            writer.write({"tokens": row})


def _open(collate: Callable[[list[Any]], Batch], folder: Path, batch: int, seq_len: int) -> Epoch:
    clean_stale_shared_memory()  # of a run that was killed
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    loader = DataLoader(dataset, batch_size=batch, collate_fn=collate, num_workers=0)
    return lambda number: iter(loader)


def _stacked(samples: list[dict[str, Any]]) -> Batch:
    """What PyTorch's default collation and a cast give."""
    return split(torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64)))


def _filled(samples: list[dict[str, Any]]) -> Batch:
    return batch_of([sample["tokens"] for sample in samples])


VARIANTS = {"mds": partial(_open, _stacked), "mds_filled": partial(_open, _filled)}
