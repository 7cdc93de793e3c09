"""Checked blocks that stay in memory, so that what is wanted of them next takes no read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .layout import BlockLayout
from .permutation import IntArray
from .rows import Part, Tokens

if TYPE_CHECKING:
    from .reader import TokenSource

BoolArray = npt.NDArray[np.bool_]

_EMPTY = -1
_LINE = 64
"""Bytes of a cache line."""


class BlockMemory:
    """Memory for blocks of several sources. Not for several threads at once.

    A block has one place where it may be, its number modulo the number of places: what is there is found for many
    sequences at once by arithmetic, and a new block takes the place of an old one. Nothing of that is state of a run:
    what isn't here is read from its file.

    Args:
        limit: bytes, at most; taken from the system as they are needed.
    """

    def __init__(self, limit: int = 128 << 20) -> None:
        self._limit = limit
        self._room = np.empty((0, 1), np.uint8)
        self._used = np.zeros(0, np.bool_)
        self.may_be_written: Callable[[], bool] = _never
        """Asked before the memory is lent again: whether a thread of the last borrower still runs; it may be stuck in a
        read that goes on later."""

    def lend(self, sources: Sequence[TokenSource]) -> list[KeptBlocks | None]:
        """The part of each source; all is forgotten that was kept before. ``None`` where there is no room for a block.

        Parts that were lent before must not be used any more.

        Raises:
            RuntimeError: they may still be.
        """
        if self.may_be_written():
            raise RuntimeError(
                "this BlockMemory is still in use: the loader it was lent to is not closed, or its thread is stuck "
                "in a read. Close that loader, or give another BlockMemory."
            )
        layouts = [source.manifest.layout for source in sources]
        counts = [int(source.shards.blocks.sum()) for source in sources]
        place = -(-max(layout.block_bytes for layout in layouts) // _LINE) * _LINE
        shape = (min(self._limit // place, sum(counts)), place)
        if self._room.shape != shape:
            self._room = np.empty(shape, np.uint8)
        numbers, self._used = np.full(shape[0], _EMPTY), np.zeros(shape[0], np.bool_)
        first = np.cumsum(counts) - counts
        return [
            KeptBlocks(self._room, numbers, self._used, int(begin), layout, source.seq_len) if shape[0] else None
            for begin, layout, source in zip(first, layouts, sources, strict=True)
        ]

    def release(self) -> None:
        """The rows that were found so far are needed no longer: other blocks may take the places of theirs."""
        self._used[:] = False


class KeptBlocks:
    """The blocks of one source that are in a :class:`BlockMemory`.

    Args:
        room: uint8 [places, bytes of the largest block]; :attr:`room`.
        numbers: int64 [places], shared by all sources: the number of the block that is kept there, -1 for none.
        used: bool [places], shared by all sources: where the rows that were found since the last
            :meth:`BlockMemory.release` lie.
        first: what the source's block 0 is numbered as there.
        layout: of the source.
        seq_len: tokens per sequence.
    """

    def __init__(
        self,
        room: npt.NDArray[np.uint8],
        numbers: IntArray,
        used: BoolArray,
        first: int,
        layout: BlockLayout,
        seq_len: int,
    ) -> None:
        self._numbers, self._used, self._first = numbers, used, first
        places, stride = room.shape
        length, item = layout.block_tokens, layout.token_bytes
        self.room, self._block_bytes = room, layout.block_bytes
        shape = (places, length // seq_len, seq_len + 1)
        self._rows: Tokens = np.ndarray(shape, layout.token_dtype, room, 0, (stride, seq_len * item, item))

    def find(self, blocks: IntArray) -> tuple[IntArray, BoolArray]:
        """The place of each of the source's blocks [n], and whether the block is there."""
        numbers = blocks + self._first
        places = numbers % len(self._numbers)
        return places, self._numbers[places] == numbers

    def use(self, places: IntArray) -> None:
        """What is at the places [n] is needed until the next :meth:`BlockMemory.release`."""
        self._used[places] = True

    def is_used(self, places: IntArray) -> BoolArray:
        """Where something is needed still [n]."""
        return self._used[places]

    def is_empty(self, places: IntArray) -> BoolArray:
        """Where nothing is kept yet [n]."""
        empty: BoolArray = self._numbers[places] == _EMPTY
        return empty

    def rows(self, which: IntArray | slice, places: IntArray, within: IntArray) -> Part:
        """The sequences ``within`` [n] of what is at ``places`` [n], as the rows ``which`` [n]; not copied."""
        return Part(which, self._rows, (places, within))

    def content(self, place: int) -> memoryview:
        """The bytes of a block at a place, to be filled."""
        return self.room[place, : self._block_bytes].data

    def clear(self, places: IntArray) -> None:
        """Nothing is kept any more at the places [n]: they may be filled with the bytes of blocks."""
        self._numbers[places] = _EMPTY

    def keep(self, places: IntArray, blocks: IntArray) -> None:
        """What the places [n] were filled with are these blocks [n], checked."""
        self._numbers[places] = blocks + self._first


def _never() -> bool:
    return False
