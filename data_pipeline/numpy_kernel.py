"""What the native kernel does (``kernel.c``), with NumPy: where there is no compiler, and to hold the other against."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import crc32c
import numpy as np
import numpy.typing as npt

from .permutation import IntArray, UIntArray, walk
from .recycled import Room
from .rows import Rows, Tokens

Widen = Callable[[int, Room], tuple[npt.NDArray[np.int32], bool]]
"""Fills a room with the rows of the batch of that number. Returns where its tokens, seen as one flat row of b T, are
EOS, ascending; and whether no row that is no hole has an EOS before its last token but one."""

_WORD = 8
"""Booleans in 64 bits."""


class NumpyKernel:
    """The inner loops of making batches."""

    def walk(
        self, indices: IntArray, sizes: IntArray, keys: UIntArray, inverse: bool, numbers: IntArray | None = None
    ) -> IntArray:
        """Where permutations take the indices, or (inverse) from where; int64, the shape of ``indices``.

        Args:
            indices: [k], each in its range.
            sizes: [k] or one, the length of each range, 1 to 2^62.
            keys: [k, 8] or [8], the keys of each permutation.
            inverse: the other way round.
            numbers: [k], which output of the streams that begin at ``keys`` are the keys; None: ``keys`` are.
        """
        return walk(indices, sizes, keys, inverse, numbers)

    def read(
        self,
        descriptor: int,
        offsets: IntArray,
        memory: npt.NDArray[np.uint8],
        places: IntArray,
        size: int,
        expected: npt.NDArray[np.uint32] | None,
        at: npt.NDArray[np.int64],
    ) -> int:
        """Read ``size`` bytes of a file from each of the ``offsets`` [n] on, to the beginnings of ``memory[places]``.

        Args:
            descriptor: of the open file.
            offsets: bytes from the file's start.
            memory: [m, size or more], the bytes of each side by side.
            places: [n].
            size: of each.
            expected: [n], the CRC32C that each should have; None: whatever it is.
            at: [1], is set to the index of the one that is being read, for others to look at.

        Returns:
            how many are right before the first that is not: it is short, can't be read or has another CRC32C.
        """
        for number, (offset, place) in enumerate(zip(offsets.tolist(), places.tolist(), strict=True)):
            at[0] = number
            content = memory[place, :size].data
            try:
                if os.preadv(descriptor, [content], offset) < size:
                    return number
            except OSError:
                return number
            if expected is not None and crc32c.crc32c(content) != expected[number]:
                return number
        return len(offsets)

    def widen(self, rows: Rows, eos_id: int, samples: IntArray, size: int) -> Widen:
        """Makes batches of ``size`` of the first n rows; those whose sample [n] is negative are holes, and become EOS.

        There are more rows where damage in a later step has ended what was read together.
        """
        tokens = rows.copy()[: len(samples)]
        if (holes := samples < 0).any():
            tokens[holes] = eos_id
        count, stride = len(tokens) // size, tokens.shape[1]
        row, place = np.divmod(_find(tokens, eos_id), stride)
        if (last := place == stride - 1).any():
            row, place = row[~last], place[~last]
        batch = row // size
        ends = (row % size * (stride - 1) + place).astype(np.int32)
        cuts = np.searchsorted(batch, np.arange(count + 1)).tolist()
        ends_of = [ends[begin:end] for begin, end in itertools.pairwise(cuts)]
        single = np.ones(count, np.bool_)
        single[batch[(place < stride - 2) & (samples[row] >= 0)]] = False
        single_of, batches = single.tolist(), tokens.reshape(count, size, stride)

        def fill(number: int, room: Room) -> tuple[npt.NDArray[np.int32], bool]:
            np.copyto(room.rows, batches[number])
            return ends_of[number], single_of[number]

        return fill


def _find(rows: Tokens, token: int) -> IntArray:
    """Where ``token`` stands in ``rows``, seen as one flat row; ascending."""
    found = (rows == token).ravel()
    whole = found.size // _WORD * _WORD
    # a look at eight at once: it is rare
    words = (found[:whole].view(np.uint64) != 0).nonzero()[0]
    places = (words[:, None] * _WORD + np.arange(_WORD)).ravel()
    return np.concatenate([places[found[places]], whole + found[whole:].nonzero()[0]])
