"""Blocks of a source, each held against its checksum when it is first read."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from .damage import DamagedBlockError
from .layout import BlockLayout
from .shard_files import OpenFile, ShardFiles


class CheckedBlocks:
    """The blocks of a source, numbered through. Not for several threads at once.

    Args:
        files: where they are read.
        layout: their arithmetic.
        count: of the source's blocks.
    """

    def __init__(self, files: ShardFiles, layout: BlockLayout, count: int) -> None:
        self._files, self._layout = files, layout
        # one bit a block: 19 MB for the 10^13 tokens of 10^5 shards
        self._checked = bytearray((count + 7) // 8)
        self._damaged: dict[int, DamagedBlockError] = {}
        self._tokens = np.empty(layout.block_tokens + 1, layout.token_dtype)

    def is_checked(self, number: int) -> bool:
        """Whether the block was found to be what was written."""
        return bool(self._checked[number >> 3] & 1 << (number & 7))

    def read(
        self, number: int, shard: int, block: int, span: tuple[int, int] | None
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        """A whole block with its look-ahead token, checked, [block_tokens + 1]; overwritten by the next call.

        Damage is looked at once more where it can have come from a cache or the network, and then remembered.

        Args:
            number: of the block in the source.
            shard, block, span: as in :meth:`ShardFiles.open`.

        Raises:
            DamagedBlockError: the block is not what was written, or not there.
        """
        if number in self._damaged:
            raise self._damaged[number]
        while True:
            try:
                return self._read(number, shard, block, span)
            except DamagedBlockError as error:
                self._checked[number >> 3] &= ~(1 << (number & 7))
                if not self._files.again(shard, span):
                    self._damaged[number] = error
                    raise

    def _read(
        self, number: int, shard: int, block: int, span: tuple[int, int] | None
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        content, start = self._tokens.data.cast("B"), self._layout.data_offset(block)
        got = self._files.open(shard, block, span).read(content, start)
        if got < len(content):
            what = f"ends at byte {start + got}, inside block {block} (bytes {start} to {start + len(content)})"
            raise self._files.damage(shard, block, "short", what)
        if not self.is_checked(number):
            self._files.check(shard, block, content)
            self._checked[number >> 3] |= 1 << (number & 7)
        return self._tokens


def read_rows(file: OpenFile, content: memoryview, row_bytes: int, places: list[int], offsets: list[int]) -> bool:
    """Read single sequences into their rows of ``content``; False where that failed: a slower reader says why."""
    descriptor, start = file.descriptor, file.start
    for place, offset in zip(places, offsets, strict=True):
        begin = place * row_bytes
        try:
            if os.preadv(descriptor, [content[begin : begin + row_bytes]], offset - start) != row_bytes:
                return False
        except OSError:
            return False
    return True
