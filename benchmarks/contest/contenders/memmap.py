"""No library: rows of one mapped uint16 array, taken at random and cast. Nothing that makes these batches can be much
faster; it checks nothing, resumes nothing and its shuffle is a list of all indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .rows import batch_of

VERSION = np.__version__
SKIP = 0

Batch = tuple[torch.Tensor, torch.Tensor]


def write(rows: npt.NDArray[np.uint16], folder: Path) -> None:
    """The array."""
    np.save(folder / "rows.npy", rows)


def _open(folder: Path, batch: int, seq_len: int) -> Callable[[int], Iterator[Batch]]:
    rows = np.load(folder / "rows.npy", mmap_mode="r").view(np.ndarray)

    def epoch(number: int) -> Iterator[Batch]:
        order = np.random.default_rng(number).permutation(len(rows)).tolist()
        for first in range(0, len(order) - batch + 1, batch):
            yield batch_of([rows[row] for row in order[first : first + batch]])

    return epoch


VARIANTS = {"limit": _open}
