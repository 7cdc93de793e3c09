"""Rows of tokens -> what the model and the loss need, documents kept apart.

A batch holds its tokens once and crosses to the device as one tensor; whatever can be computed from them is computed
where it is used, when it is first used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .kernel import load
from .numpy_kernel import Widen
from .permutation import IntArray
from .recycled import Room
from .rows import Rows, Tokens

HOLE = -1
"""The sample id of a row that holds no sample."""


@dataclass(eq=False)
class Batch:
    """``b`` sequences of ``T`` tokens of one micro-batch of one rank.

    Attributes:
        rows: int64 [b, T + 1], contiguous; each sequence and the token that follows it.
        eos_id: the token that ends a document.
        ids: int64 [3, b]: :attr:`source_ids`, :attr:`sample_ids` and :attr:`run_positions`.
        document_ends: int32 [k], ascending, always on the host: where ``tokens``, seen as one flat row of ``b T``, is
            EOS. Found on the host's copy, so that nobody has to wait for the device to know the boundaries.
        single_document: known on the host: no row that is no hole has a document boundary inside, so that attention
            may be plain causal.
    """

    rows: torch.Tensor
    eos_id: int
    ids: torch.Tensor
    document_ends: npt.NDArray[np.int32]
    single_document: bool

    @cached_property
    def tokens(self) -> torch.Tensor:
        """int64 [b, T], a view of ``rows``."""
        return self.rows[:, :-1]

    @cached_property
    def labels(self) -> torch.Tensor:
        """int64 [b, T], a view of ``rows``; the token that follows each token."""
        return self.rows[:, 1:]

    @property
    def source_ids(self) -> torch.Tensor:
        """int64 [b]; the index of the row's source."""
        return self.ids[0]

    @property
    def sample_ids(self) -> torch.Tensor:
        """int64 [b]; one number per sequence of the whole mixture, the same in every epoch; -1 in a hole, a row of EOS
        in the place of a damaged sequence, or one that fills up the last batch of an evaluation."""
        return self.ids[1]

    @property
    def run_positions(self) -> torch.Tensor:
        """int64 [b]; the position in the run, of a hole too; in an evaluation the index, -1 in a hole."""
        return self.ids[2]

    @cached_property
    def loss_mask(self) -> torch.Tensor:
        """bool [b, T]; False where the token is EOS, for its label would belong to another document (this leaves out
        EOS filling too), and in holes."""
        return self.tokens != self.eos_id

    @cached_property
    def label_counts(self) -> torch.Tensor:
        """int64 [b]; the labels that count in each row, ``loss_mask.sum(dim=1)``, from the host's scan."""
        rows, length = len(self.rows), self.rows.shape[1] - 1
        counts = length - np.bincount(self.document_ends // length, minlength=rows)
        return torch.from_numpy(counts).to(self.rows.device, non_blocking=True)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [b, T]; counted from the start of the document, or of the row where the document began earlier."""
        index = torch.arange(self.rows.shape[1] - 1, device=self.rows.device)
        first = torch.zeros_like(self.loss_mask, dtype=torch.int64)
        torch.mul(self._ends_before, index[1:], out=first[:, 1:])
        return index - first.cummax(dim=1).values

    @cached_property
    def document_ids(self) -> torch.Tensor:
        """int32 [b, T]; 0, 1, 2, ... along the row, one more after each EOS."""
        ids = torch.zeros_like(self.loss_mask, dtype=torch.int32)
        torch.cumsum(self._ends_before, dim=1, dtype=torch.int32, out=ids[:, 1:])
        return ids

    @property
    def _ends_before(self) -> torch.Tensor:
        """bool [b, T - 1]: whether the token before token 1, 2, ... is EOS."""
        return ~self.loss_mask[:, :-1]

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


def make_batch(rows: Tokens, eos_id: int, source_ids: IntArray, sample_ids: IntArray, run_positions: IntArray) -> Batch:
    """Build one batch; no tensor shares memory with the arguments.

    Args:
        rows: [b, T + 1], each sequence with the token that follows it.
        eos_id: the token that ends a document.
        source_ids: [b].
        sample_ids: [b]; -1 makes the row a hole, and its tokens EOS.
        run_positions: [b].
    """
    widen = load().widen(Rows.of(rows), eos_id, sample_ids, len(rows))
    maker = BatchMaker(widen, eos_id, source_ids, sample_ids, run_positions, len(rows))
    return maker.make(0, Room(rows.shape))


class BatchMaker:
    """Makes batches of one size.

    Args:
        widen: makes the tokens of each.
        eos_id: the token that ends a document.
        source_ids, sample_ids, run_positions: int64 [n].
        size: rows of a batch; divides n.
    """

    def __init__(
        self,
        widen: Widen,
        eos_id: int,
        source_ids: IntArray,
        sample_ids: IntArray,
        run_positions: IntArray,
        size: int,
    ) -> None:
        self._widen, self._eos_id = widen, eos_id
        count = len(sample_ids) // size
        ids = np.empty((count, 3, size), np.int64)
        for number, values in enumerate((source_ids, sample_ids, run_positions)):
            ids[:, number] = values.reshape(count, size)
        self._ids = ids

    def make(self, number: int, room: Room) -> Batch:
        """The batch of that number, in a room that nobody uses."""
        ends, single = self._widen(number, room)
        batch = _Lazy.__new__(_Lazy)
        # numpy cuts ten times as fast as torch
        batch.__dict__ = {
            "_room": room.rows,
            "_ids": self._ids[number],
            "eos_id": self._eos_id,
            "document_ends": ends,
            "single_document": single,
            "tokens": torch.from_numpy(room.tokens),
            "labels": torch.from_numpy(room.labels),
        }
        return batch


class _Lazy(Batch):
    """A batch whose rows and ids become tensors when they are first asked for: it costs as much as all else of it."""

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in ("rows", "ids"):
            raise AttributeError(name)
        tensor = torch.from_numpy(vars(self)["_room" if name == "rows" else "_ids"])
        setattr(self, name, tensor)
        return tensor
