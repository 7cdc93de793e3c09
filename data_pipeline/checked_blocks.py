"""Blocks of a source, each held against its checksum when it is first read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .block_memory import KeptBlocks
from .damage import DamagedBlockError
from .kernel import load
from .layout import BlockLayout
from .permutation import IntArray
from .rows import Part, Rows, Tokens
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

    def some(self, which: IntArray) -> Wanted:
        """Those of the indices ``which`` [k]."""
        spans = None if self.spans is None else self.spans[:, which]
        return Wanted(self.shards[which], self.blocks[which], self.numbers[which], self.within[which], spans)

    def block(self, index: int) -> Block:
        """That of one of the sequences."""
        span = None if self.spans is None else (int(self.spans[0, index]), int(self.spans[1, index]))
        return Block(int(self.numbers[index]), int(self.shards[index]), int(self.blocks[index]), span)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Where the sequences that follow each other in one file begin and end."""
        if not len(self.shards):
            return iter(())
        changed = self.shards[1:] != self.shards[:-1]
        if self.spans is not None:
            changed = changed | (self.spans[:, 1:] != self.spans[:, :-1]).any(axis=0)
        return itertools.pairwise([0, *(changed.nonzero()[0] + 1).tolist(), len(self.shards)])


class Notes:
    """What a read is at, for another thread to look at."""

    def __init__(self) -> None:
        self.at = np.zeros(1, np.int64)
        """[1], which of the blocks it is; whoever reads them counts on."""
        self._run: tuple[int, IntArray] | None = None
        self._seen: tuple[tuple[int, IntArray], int, tuple[int, int]] | None = None

    def begin(self, shard: int, blocks: IntArray) -> None:
        """The blocks [n] of a shard, by its row, are read from now on."""
        self.at[0] = 0
        self._run = shard, blocks

    def end(self) -> None:
        """Nothing is read any more."""
        self._run = None

    def look(self) -> tuple[int, int] | None:
        """(row of the shard, block) that is being read, or None; the same object as long as it is the same read."""
        run, number = self._run, int(self.at[0])
        if run is None:
            return None
        if self._seen is None or self._seen[0] is not run or self._seen[1] != number:
            shard, blocks = run
            self._seen = run, number, (shard, int(blocks[min(number, len(blocks) - 1)]))
        return self._seen[2]


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
        self._kernel = load()
        # one bit a block: 19 MB for the 10^13 tokens of 10^5 shards
        self._bits = bytearray((count + 7) // 8)
        self._checked = np.frombuffer(self._bits, np.uint8)
        self._damaged: Damaged = {}
        self._tokens: Tokens = np.empty(layout.block_tokens + 1, layout.token_dtype)
        self._content = self._tokens.data.cast("B")
        self._notes = Notes()

    @property
    def reading(self) -> tuple[int, int] | None:
        """(row of the shard, block) that a read is at; a new tuple for each."""
        return self._notes.look()

    def rows(self, wanted: Wanted, kept: KeptBlocks | None) -> tuple[Rows, Damaged]:
        """The sequences [n, seq_len + 1], and what is wrong, by row; what stands in those is undefined.

        Args:
            wanted: n of them.
            kept: blocks that need no reading; those that are read for the first time are put there. The rows that were
                found there are good until its memory is released.

        Raises:
            OSError: the disk.
        """
        try:
            count, parts = len(wanted.numbers), []
            missing = np.arange(count)
            if kept is not None:
                places, there = kept.find(wanted.numbers)
                kept.use(places[there])
                if not there.all():
                    self._fill(wanted, kept, places, there)
                    there = kept.find(wanted.numbers)[1]
                    kept.use(places[there])
                if there.all():
                    return Rows(count, [kept.rows(slice(None), places, wanted.within)]), {}
                missing, found = (~there).nonzero()[0], there.nonzero()[0]
                parts.append(kept.rows(found, places[found], wanted.within[found]))
            read: Tokens = np.empty((len(missing), self._seq_len + 1), self._layout.token_dtype)
            parts.append(Part(missing, read, (np.arange(len(missing)),)))
            damaged = self._read_missing(wanted.some(missing), read)
            return Rows(count, parts), {int(missing[row]): error for row, error in damaged.items()}
        finally:
            self._notes.end()

    def _fill(self, wanted: Wanted, kept: KeptBlocks, places: IntArray, there: BoolArray) -> None:
        """Read blocks to where they are kept: those that must be read as a whole now, and others where there is room.

        Left out is what would take the place of another that is wanted now, by this source or another.
        """
        order, edges = _by_block(wanted, (~there).nonzero()[0])
        first = order[edges[:-1]]
        first = first[~self._is_checked(wanted.numbers[first]) | kept.is_empty(places[first])]
        first = first[~kept.is_used(places[first])]
        first = first[np.sort(np.unique(places[first], return_index=True)[1])]
        blocks, places = wanted.some(first), places[first]
        kept.clear(places)
        right = np.zeros(len(places), np.bool_)
        for begin, end in blocks.runs():
            while begin < end:
                count = self._read_run(blocks, begin, end, kept.room, places, self._block_bytes, True)
                right[begin : begin + count] = True
                if (begin := begin + count) < end:
                    with suppress(DamagedBlockError):  # it is met again with the sequences that are missing
                        self._read(blocks.block(begin), kept.content(int(places[begin])))
                        right[begin] = True
                    begin += 1
        self._mark(blocks.numbers[right])
        kept.keep(places[right], blocks.numbers[right])

    def _read_missing(self, wanted: Wanted, rows: Tokens) -> Damaged:
        """Read all sequences: each by itself where few of a checked block are wanted, else whole blocks."""
        if not len(rows):
            return {}
        order, edges = _by_block(wanted, np.arange(len(rows)))
        counts = np.diff(edges)
        single = self._is_checked(wanted.numbers[order[edges[:-1]]]) & (counts < self._many)
        failed = self._read_single(wanted, order[np.repeat(single, counts)], rows) if single.any() else set()
        damaged: Damaged = {}
        for number in range(len(counts)):
            some = order[edges[number] : edges[number + 1]].tolist()
            if single[number] and failed.isdisjoint(some):
                continue
            try:
                self._read(wanted.block(some[0]), self._content)
            except DamagedBlockError as error:
                damaged |= dict.fromkeys(some, error)
                continue
            for row in some:
                begin = int(wanted.within[row]) * self._seq_len
                rows[row] = self._tokens[begin : begin + self._seq_len + 1]
        return damaged

    def _read_single(self, wanted: Wanted, some: IntArray, rows: Tokens) -> set[int]:
        """Read the sequences ``some`` one by one; returns those where that failed: reading their blocks says why."""
        pieces, memory = wanted.some(some), rows.view(np.uint8)
        failed = set()
        for begin, end in pieces.runs():
            while begin < end:
                begin += self._read_run(pieces, begin, end, memory, some, memory.shape[1], False)
                if begin < end:
                    failed.add(int(some[begin]))
                    begin += 1
        return failed

    def _read_run(
        self,
        pieces: Wanted,
        begin: int,
        end: int,
        memory: npt.NDArray[np.uint8],
        places: IntArray,
        size: int,
        whole: bool,
    ) -> int:
        """Read blocks, checked, or sequences of one file to ``memory[places]``; returns how many are right before the
        first that is not, can't be opened, or is to be checked as part of its block."""
        shard, block, span = pieces.block(begin)[1:]
        run = slice(begin, end)
        offsets = self._offset + pieces.blocks[run] * self._stride
        self._notes.begin(shard, pieces.blocks[run])
        try:
            expected = None
            if whole:
                if self._damaged and not self._damaged.keys().isdisjoint(pieces.numbers[run].tolist()):
                    return 0
                expected = self._files.checksums(shard, block)[pieces.blocks[run]]
            else:
                offsets += pieces.within[run] * (self._seq_len * self._layout.token_bytes)
            file = self._files.open(shard, block, span)
        except DamagedBlockError:
            return 0
        if file.as_found and not whole:
            return 0
        return self._kernel.read(
            file.descriptor, offsets - file.start, memory, places[run], size, expected, self._notes.at
        )

    def _mark(self, numbers: IntArray) -> None:
        """The blocks [n] were found to be what was written."""
        np.bitwise_or.at(self._checked, numbers >> 3, (1 << (numbers & 7)).astype(np.uint8))

    def _is_checked(self, numbers: IntArray) -> BoolArray:
        """Whether each block [n] was found to be what was written."""
        checked: BoolArray = (self._checked[numbers >> 3] >> (numbers & 7) & 1) == 1
        return checked

    def _read(self, wanted: Block, content: memoryview) -> None:
        """Fill ``content`` with a block and its look-ahead token.

        It is checked when it is read for the first time, to be kept, or from a file that is damaged. Damage is looked
        at once more where it can have come from a cache or the network, and then remembered.

        Raises:
            DamagedBlockError: the block is not what was written, or not there.
        """
        number, shard, block, span = wanted
        if number in self._damaged:
            raise self._damaged[number]
        self._notes.begin(shard, np.array([block]))
        while True:
            try:
                start = self._offset + block * self._stride
                file = self._files.open(shard, block, span)
                got = file.read(content, start)
                if got < self._block_bytes:
                    there = f"ends at byte {start + got}, inside block {block}"
                    whole = f"bytes {start} to {start + self._block_bytes}"
                    raise self._files.damage(shard, block, "short", f"{there} ({whole})")
                checked = self._bits[number >> 3] & 1 << (number & 7)
                if content is not self._content or file.as_found or not checked:
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
