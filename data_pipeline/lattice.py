"""One phase's counts laid into a lattice of slots and rows; draws are counted by a search in a table of M entries.

Cell (row T, column x) holds the number ``(T a + x k R) mod M``, M = K R, and each source owns an arc of as many numbers
as it has counts: a rank-1 lattice (Niederreiter, "Random Number Generation and Quasi-Monte Carlo Methods", SIAM 1992,
chapter 5). :mod:`~data_pipeline.slots` says what for.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from .permutation import IntArray

END = 1 << 62
"""Past all positions; what would come later is never drawn."""


class _Steps(NamedTuple):
    """The lattice of K columns and R rows: the numbers' steps from row to row and column to column, and inverses."""

    row: int
    column: int
    lead: int
    """Rows by which each column runs ahead of the one before: one walk over the numbers serves all columns."""
    turn: int
    """Columns by which a row of a block is turned against the same row of the block before."""


class Lattice:
    """K columns and as many rows as the phase has; places are positions counted from the phase's start.

    A column's draws are counted along the walk ``w a mod M``, w = 0, 1, 2, ...: column x begins at w = ``x lead``. The
    draws of all columns are counted over the block's places 0 .. M - 1: row t of block b is row t of block 0, turned by
    ``b turn`` columns.
    """

    def __init__(self, slots: int, block: int, counts: IntArray) -> None:
        self._slots, self._block, self.counts = slots, block, counts
        self._steps = _lattice_steps(slots, block)
        self._first = np.cumsum(counts) - counts
        self._only = int(counts.argmax()) if counts.max() == block else None  # the source that owns all of it
        places = np.arange(block)
        numbers = np.cumsum(counts).searchsorted(np.arange(block), side="right")
        row, column = places // slots, places % slots
        self._along_walk = numbers[places * self._steps.row % block]
        self._walk = self._grouped(self._along_walk)
        self._places = self._grouped(numbers[(row * self._steps.row + column * self._steps.column) % block])

    def source_at(self, places: IntArray) -> IntArray:
        """The source of each place; int64 [k]."""
        if self._only is not None:
            return np.full(len(places), self._only)
        row, column = np.divmod(places, self._slots)
        source: IntArray = self._along_walk[(row + column * self._steps.lead) % self._block]
        return source

    def drawn_by_column(self, sources: IntArray, columns: IntArray, rows: IntArray) -> IntArray:
        """Draws of each source by each column in its first ``rows`` rows; int64 [k]."""
        if self._only is not None:
            return np.where(sources == self._only, rows, 0)
        begin = columns * self._steps.lead % self._block
        blocks, end = np.divmod(begin + rows, self._block)
        counted = np.searchsorted(self._walk, np.stack([begin, end]) + sources * self._block)
        draws: IntArray = blocks * self.counts[sources] + counted[1] - counted[0]
        return draws

    def drawn(self, sources: IntArray, places: IntArray) -> IntArray:
        """Draws of each source by all columns before each place; int64 [k]."""
        blocks, inside = np.divmod(places, self._block)
        column = inside % self._slots
        row = inside - column + sources * self._block
        turned = self._turned(blocks)
        over = np.maximum(turned + column - self._slots, 0)
        edges = np.stack([row + turned, row + np.minimum(turned + column, self._slots), row + over])
        begin, end, wrapped_end = np.searchsorted(self._places, edges)
        draws: IntArray = blocks * self.counts[sources] - self._first[sources] + end - begin + wrapped_end
        return draws

    def place_of_column_draw(self, source: int, columns: IntArray, draws: IntArray) -> IntArray:
        """The place of the draw of the source that comes after ``draws`` others of the same column; int64 [k]."""
        begin = columns * self._steps.lead % self._block
        before = np.searchsorted(self._walk, begin + source * self._block) - self._first[source]
        blocks, rank = np.divmod(draws + before, self.counts[source])
        blocks = np.minimum(blocks, END // (self._block * self._slots) + 2)
        end = blocks * self._block + self._walk[self._first[source] + rank] - source * self._block
        places: IntArray = (end - begin) * self._slots + columns
        return places

    def place_of_draw(self, source: int, draws: IntArray) -> IntArray:
        """The place of the draw of the source that comes after ``draws`` others; int64 [k]."""
        blocks, rank = np.divmod(draws, self.counts[source])
        blocks = np.minimum(blocks, END // self._block + 1)
        item = self._first[source] + rank
        row = (self._places[item] - source * self._block) // self._slots
        row_begin = row * self._slots + source * self._block
        first, turned, last = np.searchsorted(
            self._places, np.stack([row_begin, row_begin + self._turned(blocks), row_begin + self._slots])
        )
        item = turned + (item - first)
        item -= (last - first) * (item >= last)
        column = (self._places[item] - row_begin - self._turned(blocks)) % self._slots
        places: IntArray = blocks * self._block + row * self._slots + column
        return places

    def _turned(self, blocks: IntArray) -> IntArray:
        return blocks % self._slots * self._steps.turn % self._slots

    def _grouped(self, sources: IntArray) -> IntArray:
        """Where each source stands, as ascending ``source * M + index``."""
        order = np.argsort(sources, kind="stable")
        grouped: IntArray = sources[order] * self._block + order
        return grouped


@functools.lru_cache(maxsize=16)
def _lattice_steps(slots: int, block: int) -> _Steps:
    rows = block // slots
    row, column = even_step(block, (1, rows)), even_step(slots)
    lead = column * rows * pow(row, -1, block) % block
    return _Steps(row, column * rows % block, lead, row * pow(column, -1, slots) % slots)


@functools.lru_cache(maxsize=16)
def stratum_step(slots: int) -> int:
    """Even along neighbouring slots, and along those of a row that draw one source: slots x with x k in an arc."""
    return even_step(slots, (pow(even_step(slots), -1, slots), slots))


def even_step(n: int, *others: tuple[int, int]) -> int:
    """The step that walks over ``range(n)``, modulo n, most evenly: as the golden ratio does on the real circle.

    It is coprime to n, and the sum of the partial quotients of step/n, plus those of ``step * factor / m`` for each of
    the other walks (factor, m), m a divisor of n, is smallest; the smallest such step. That sum bounds the discrepancy
    of any stretch of a walk.
    """
    steps = np.arange(1, max(1, n // 2) + 1)  # -step is as even
    quotients, common = _partial_quotients(n, steps)
    for factor, modulus in others:
        quotients += _partial_quotients(modulus, steps * factor)[0]
    return int(steps[np.argmin(np.where(common == 1, quotients, 1 << 40))])


def _partial_quotients(n: int, steps: IntArray) -> tuple[IntArray, IntArray]:
    """The sums of the partial quotients of (steps mod n)/n and the greatest common divisors with n; int64 [k]."""
    larger, smaller = np.full(len(steps), n), steps % n
    total = np.zeros(len(steps), np.int64)
    while (live := smaller > 0).any():
        quotient = np.floor_divide(larger, smaller, where=live, out=np.zeros_like(larger))
        total += quotient
        larger, smaller = np.where(live, smaller, larger), np.where(live, larger - quotient * smaller, 0)
    return total, larger
