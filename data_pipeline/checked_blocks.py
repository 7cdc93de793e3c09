"""Blocks of a source, each held against its checksum when it is first read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .block_memory import KeptBlocks, Tokens
from .damage import DamagedBlockError
from .layout import BlockLayout
from .permutation import IntArray
from .shard_files import ShardFiles

_WHOLE_BLOCK = 0.5
"""From this part of a block's sequences on, the block is read as a whole and cut up in memory."""

Span = tuple[int, int] | None
BoolArray = npt.NDArray[np.bool_]
Damaged = dict[int, DamagedBlockError]


class Block(NamedTuple):
    """A block, counted through the source; the row of its shard, its number there, and what to fetch with it."""

    number: int
    shard: int
    block: int
    span: Span


class Wanted(NamedTuple):
    """Where some sequences [n] of a source lie."""

    shards: IntArray
    """[n] the row of the shard,"""
    blocks: IntArray
    """[n] the block in it,"""
    numbers: IntArray
    """[n] the same block, counted through the source,"""
    within: IntArray
    """[n] and the sequence in the block."""
    spans: IntArray | None
    """[2, n] the blocks ``[first, stop)`` of the shard to fetch together with each; None: all."""

    def blocks_of(self, some: IntArray) -> Iterator[Block]:
        """Of each of the sequences ``some``."""
        spans: Iterable[Span] = itertools.repeat(None, len(some))
        if self.spans is not None:
            spans = zip(*self.spans[:, some].tolist(), strict=True)
        numbers, shards, blocks = (values[some].tolist() for values in (self.numbers, self.shards, self.blocks))
        return map(Block, numbers, shards, blocks, spans)


class CheckedBlocks:
    """The blocks of a source, numbered through. Not for several threads at once.

    Args:
        files: where they are read.
        layout: their arithmetic.
        count: of the source's blocks.
        seq_len: tokens per sequence.
    """

    def __init__(self, files: ShardFiles, layout: BlockLayout, count: int, seq_len: int) -> None:
        self._files, self._layout, self._seq_len = files, layout, seq_len
        self._offset, self._stride, self._block_bytes = layout.data_offset(0), layout.member_stride, layout.block_bytes
        self._many = layout.block_tokens // seq_len * _WHOLE_BLOCK
        # one bit a block: 19 MB for the 10^13 tokens of 10^5 shards
        self._bits = bytearray((count + 7) // 8)
        self._checked = np.frombuffer(self._bits, np.uint8)
        self._damaged: Damaged = {}
        self._tokens: Tokens = np.empty(layout.block_tokens + 1, layout.token_dtype)
        self._content = self._tokens.data.cast("B")
        self.reading: tuple[int, int] | None = None
        """(row of the shard, block) that a read is at; a new tuple for each."""

    def rows(self, wanted: Wanted, kept: KeptBlocks | None) -> tuple[Tokens, Damaged]:
        """The sequences [n, seq_len + 1] in a new array, and what is wrong, by row; what stands in those is undefined.

        Args:
            wanted: n of them.
            kept: blocks that need no reading; those that are read for the first time are put there.

        Raises:
            OSError: the disk.
        """
        try:
            if kept is None:
                rows: Tokens = np.empty((len(wanted.numbers), self._seq_len + 1), self._layout.token_dtype)
                missing = np.arange(len(rows))
            else:
                places, there = kept.find(wanted.numbers)
                if not there.all():
                    self._fill(wanted, kept, places, there)
                    there = kept.find(wanted.numbers)[1]
                rows, missing = kept.rows(places, wanted.within), (~there).nonzero()[0]
            damaged = self._read_missing(wanted, missing, rows) if missing.size else {}
            return rows, damaged
        finally:
            self.reading = None

    def _fill(self, wanted: Wanted, kept: KeptBlocks, places: IntArray, there: BoolArray) -> None:
        """Read blocks to where they are kept: those that must be read as a whole now, and others where there is room.

        Left out is what would take the place of another that is wanted now.
        """
        taken = set(places[there].tolist())
        order, edges = _by_block(wanted, (~there).nonzero()[0])
        first = order[edges[:-1]]
        first = first[~self._is_checked(wanted.numbers[first]) | kept.is_empty(places[first])]
        for place, block in zip(places[first].tolist(), wanted.blocks_of(first), strict=True):
            if place in taken:
                continue
            taken.add(place)
            try:
                self._read(block, kept.clear(place))
            except DamagedBlockError:
                continue  # it is met again with the sequences that are missing
            kept.keep(place, block.number)

    def _read_missing(self, wanted: Wanted, missing: IntArray, rows: Tokens) -> Damaged:
        """Read the sequences ``missing``: each by itself where few of a checked block are wanted, else whole blocks."""
        order, edges = _by_block(wanted, missing)
        counts = np.diff(edges)
        single = self._is_checked(wanted.numbers[order[edges[:-1]]]) & (counts < self._many)
        failed = self._read_single(wanted, order[np.repeat(single, counts)], rows) if single.any() else set()
        damaged: Damaged = {}
        for number, block in enumerate(wanted.blocks_of(order[edges[:-1]])):
            some = order[edges[number] : edges[number + 1]].tolist()
            if single[number] and failed.isdisjoint(some):
                continue
            try:
                self._read(block, self._content)
            except DamagedBlockError as error:
                damaged |= dict.fromkeys(some, error)
                continue
            for row in some:
                begin = int(wanted.within[row]) * self._seq_len
                rows[row] = self._tokens[begin : begin + self._seq_len + 1]
        return damaged

    def _read_single(self, wanted: Wanted, some: IntArray, rows: Tokens) -> set[int]:
        """Read the sequences ``some`` one by one; returns those where that failed: reading their blocks says why."""
        content, row_bytes = rows.data.cast("B"), rows.strides[0]
        offsets = self._offset + wanted.blocks[some] * self._stride
        offsets += wanted.within[some] * (self._seq_len * self._layout.token_bytes)
        opened: tuple[int, Span] | None = None
        failed = set()
        for row, offset, (_, shard, block, span) in zip(
            some.tolist(), offsets.tolist(), wanted.blocks_of(some), strict=True
        ):
            self.reading = (shard, block)
            begin = row * row_bytes
            try:
                if opened != (shard, span):
                    file, opened = self._files.open(shard, block, span), (shard, span)
                got = os.preadv(file.descriptor, [content[begin : begin + row_bytes]], offset - file.start)
            except (OSError, DamagedBlockError):
                got = -1
            if got != row_bytes:
                failed.add(row)
        return failed

    def _is_checked(self, numbers: IntArray) -> BoolArray:
        """Whether each block [n] was found to be what was written."""
        checked: BoolArray = (self._checked[numbers >> 3] >> (numbers & 7) & 1) == 1
        return checked

    def _read(self, wanted: Block, content: memoryview) -> None:
        """Fill ``content`` with a block and its look-ahead token.

        It is checked when it is read for the first time, and when it is to be kept. Damage is looked at once more where
        it can have come from a cache or the network, and then remembered.

        Raises:
            DamagedBlockError: the block is not what was written, or not there.
        """
        number, shard, block, span = wanted
        if number in self._damaged:
            raise self._damaged[number]
        self.reading = (shard, block)
        while True:
            try:
                start = self._offset + block * self._stride
                got = self._files.open(shard, block, span).read(content, start)
                if got < self._block_bytes:
                    there = f"ends at byte {start + got}, inside block {block}"
                    whole = f"bytes {start} to {start + self._block_bytes}"
                    raise self._files.damage(shard, block, "short", f"{there} ({whole})")
                if content is not self._content or not self._bits[number >> 3] & 1 << (number & 7):
                    self._files.check(shard, block, content)
                    self._bits[number >> 3] |= 1 << (number & 7)
                return
            except DamagedBlockError as error:
                self._bits[number >> 3] &= ~(1 << (number & 7))
                if not self._files.again(shard, span):
                    self._damaged[number] = error
                    raise


def _by_block(wanted: Wanted, some: IntArray) -> tuple[IntArray, IntArray]:
    """The sequences ``some`` [k] in the order of their blocks, and where each block's begin and the last one's end."""
    order = some[np.argsort(wanted.numbers[some], kind="stable")]
    numbers = wanted.numbers[order]
    return order, np.concatenate([[0], (numbers[1:] != numbers[:-1]).nonzero()[0] + 1, [len(order)]])
