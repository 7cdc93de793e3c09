"""Rows of tokens -> what the model and the loss need, documents kept apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .permutation import IntArray


@dataclass(frozen=True, eq=False)
class Batch:
    """``b`` sequences of ``T`` tokens of one micro-batch of one rank.

    Attributes:
        tokens: int64 [b, T].
        labels: int64 [b, T]; the token that follows each token.
        loss_mask: bool [b, T]; False where the token is EOS, for its label would belong to another document (this
            leaves out EOS filling too), and in holes.
        positions: int64 [b, T]; counted from the start of the document, or of the row where the document began earlier.
        document_ids: int32 [b, T]; 0, 1, 2, ... along the row, one more after each EOS.
        source_ids: int64 [b]; the index of the row's source.
        sample_ids: int64 [b]; one number per sequence of the whole mixture, the same in every epoch; -1 in a hole, a
            row of EOS that fills up the last batch of an evaluation.
        run_positions: int64 [b]; the position in the run (the index, in an evaluation); -1 in a hole.
        single_document: known on the host: no row that is no hole has a document boundary inside, so that attention
            may be plain causal.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    document_ids: torch.Tensor
    source_ids: torch.Tensor
    sample_ids: torch.Tensor
    run_positions: torch.Tensor
    single_document: bool

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``; copies from pinned memory overlap with what runs there."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked host memory (needs CUDA)."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: change(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        return Batch(**moved)


def make_batch(
    rows: npt.NDArray[np.unsignedinteger[Any]],
    eos_id: int,
    source_ids: IntArray,
    sample_ids: IntArray,
    run_positions: IntArray,
) -> Batch:
    """Build a batch; no tensor shares memory with the arguments.

    Args:
        rows: [b, T + 1], each sequence with the token that follows it.
        eos_id: the token that ends a document.
        source_ids: [b].
        sample_ids: [b]; -1 makes the row a hole, and its tokens EOS.
        run_positions: [b].
    """
    holes = sample_ids < 0
    tokens, labels = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    tokens[holes] = labels[holes] = eos_id
    inside = tokens != eos_id
    length = tokens.shape[1]
    document_ids = np.zeros(tokens.shape, np.int32)
    np.cumsum(~inside[:, :-1], axis=1, dtype=np.int32, out=document_ids[:, 1:])
    first = np.zeros(tokens.shape, np.int64)
    np.multiply(~inside[:, :-1], np.arange(1, length), out=first[:, 1:])
    np.maximum.accumulate(first, axis=1, out=first)
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(inside),
        positions=torch.from_numpy(np.subtract(np.arange(length), first, out=first)),
        document_ids=torch.from_numpy(document_ids),
        source_ids=torch.tensor(source_ids),
        sample_ids=torch.tensor(sample_ids),
        run_positions=torch.tensor(run_positions),
        single_document=bool((inside[:, :-1].all(axis=1) | holes).all()),
    )
