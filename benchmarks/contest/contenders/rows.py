"""From sequences of tokens to a batch: the cheapest way there is, for every contender that lets us choose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def batch_of(rows: Sequence[npt.NDArray[np.uint16]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of ``rows`` (each [T + 1]): two views of one int64 tensor."""
    together = np.empty((len(rows), len(rows[0])), np.int64)
    for number, row in enumerate(rows):
        together[number] = row
    return split(torch.from_numpy(together))


def split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of int64 ``rows`` [b, T + 1]."""
    return rows[:, :-1], rows[:, 1:]
