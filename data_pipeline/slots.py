"""The mixture of the windowed order: K slots take turns, and each of them draws every source at its exact share.

Positions are laid out in rows of K, and position p belongs to slot p mod K, so that with a global batch that is a
multiple of K (and micro-steps that divide K) a rank always holds the same slots. Weights become counts c_s that sum to
M = K R. From the start of a phase on, the cell in row T and column x has the number ``(T a + x k R) mod M``, and each
source owns an arc of c_s numbers. This is a rank-1 lattice (Niederreiter, "Random Number Generation and Quasi-Monte
Carlo Methods", SIAM 1992, chapter 5), and all that the order needs follows from it:

- a row holds K numbers that lie R apart: each source comes c_s / R times, rounded down or up;
- R rows hold every number once (a is coprime to R): every block of M positions that begins with a row has exactly the
  counts c_s;
- a column walks over the numbers in steps of a, all of them in M rows: a slot draws each source at its share too, and
  as a/M, (a mod R)/R and k/K have small partial quotients, no slot, no run of rows and no run of columns is ever more
  than a few draws away from it (ibid., section 3.1; the tests hold the bounds).

Counting back is a search in a table of M entries, whatever the position. Which stratum of a source a slot reads is
another such walk: neighbouring slots, and those of a row that draw the same source, read from all over it, so that a
batch or micro-batch of fewer than K positions is mixed too.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .mixture import MIXTURE_BLOCK, Phase, phase_counts
from .permutation import IntArray

_END = 1 << 62
"""Past all positions; what would come later is never drawn."""


class SlotMixture:
    """The map position -> (source, draws before it) and its inverse, counting by slot or over all slots.

    Args:
        slots: K, 1 to 65,536.
        phases: as for :class:`~data_pipeline.mixture.Mixture`; draws go on being counted over them.

    Raises:
        UserError: weights or phases that :func:`~data_pipeline.mixture.phase_counts` refuses.
    """

    def __init__(self, slots: int, phases: Sequence[Phase]) -> None:
        self.slots = slots
        self.block = slots * -(-MIXTURE_BLOCK // slots)
        """M, the positions that hold the exact counts."""
        self.phases = phase_counts(phases, self.block)
        self._starts = [start for start, _ in self.phases]
        self._ends = [*self._starts[1:], _END]
        patterns = {counts.tobytes(): _Pattern(slots, self.block, counts) for _, counts in self.phases}
        self._patterns = [patterns[counts.tobytes()] for _, counts in self.phases]
        every = np.arange(len(self.phases[0][1]))
        self._stratum_step = _stratum_step(slots)
        self._used = [np.zeros(len(every), np.int64)]
        for pattern, start, end in zip(self._patterns, self._starts, self._ends[:-1], strict=False):
            self._used.append(self._used[-1] + pattern.drawn(every, np.full(len(every), end - start)))

    def sources_at(self, start: int, count: int) -> IntArray:
        """The source of each of the positions ``start .. start + count - 1``; int64 [count]."""
        return np.concatenate(
            [
                self._patterns[number].source_at(np.arange(first - self._starts[number], stop - self._starts[number]))
                for number, first, stop in self._pieces(start, start + count)
            ]
            or [np.empty(0, np.int64)]
        )

    def stratum_of(self, slots: IntArray) -> IntArray:
        """The stratum that each slot (or each position's slot) [k] reads; int64 [k]."""
        return slots % self.slots * self._stratum_step % self.slots

    def slot_of(self, strata: IntArray) -> IntArray:
        """The slot that reads each stratum [k]; int64 [k]."""
        return strata * pow(self._stratum_step, -1, self.slots) % self.slots

    def slot_draws(self, positions: IntArray, sources: IntArray) -> IntArray:
        """How often the slot of each position [k] drew the source [k] at earlier positions; int64 [k]."""
        draws = np.zeros(len(positions), np.int64)
        begun = bisect.bisect_right(self._starts, int(positions.max(initial=0)))
        for pattern, start, end in zip(self._patterns[:begun], self._starts, self._ends, strict=False):
            columns = (positions - start) % self.slots
            rows = self._rows(np.minimum(positions, end) - start, columns)
            draws += pattern.drawn_by_column(sources, columns, rows)
        return draws

    def all_draws(self, positions: IntArray, sources: IntArray) -> IntArray:
        """How often all slots drew the source [k] before each position [k]; int64 [k]."""
        draws = np.empty(len(positions), np.int64)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            drawn = self._patterns[number].drawn(sources[here], positions[here] - self._starts[number])
            draws[here] = self._used[number][sources[here]] + drawn
        return draws

    def position_of_slot_draw(self, source: int, slots: IntArray, draws: IntArray) -> IntArray:
        """Where slot [k] draws the source after ``draws`` [k] earlier times; int64 [k], -1 for never."""
        positions = np.full(len(draws), -1, np.int64)
        before = np.zeros(len(draws), np.int64)
        for pattern, start, end in zip(self._patterns, self._starts, self._ends, strict=True):
            if pattern.counts[source]:
                columns = (slots - start) % self.slots
                found = start + pattern.place_of_column_draw(source, columns, draws - before)
                positions = np.where((draws >= before) & (positions < 0) & (found < end), found, positions)
                rows = self._rows(end - start, columns)
                before += pattern.drawn_by_column(np.full(len(draws), source), columns, rows)
        return positions

    def position_of_draw(self, source: int, draws: IntArray) -> IntArray:
        """Where the source is drawn after ``draws`` [k] earlier times by all slots; int64 [k], -1 for never."""
        positions = np.full(len(draws), -1, np.int64)
        for pattern, start, end, used in zip(self._patterns, self._starts, self._ends, self._used, strict=True):
            if pattern.counts[source]:
                found = start + pattern.place_of_draw(source, draws - used[source])
                positions = np.where((draws >= used[source]) & (positions < 0) & (found < end), found, positions)
        return positions

    def _rows(self, places: IntArray | int, columns: IntArray) -> IntArray:
        """How many places of each column lie before the places; int64 [k]."""
        return np.maximum(places - columns + self.slots - 1, 0) // self.slots

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The parts of ``[start, stop)`` that lie in one phase each: (phase, start, stop)."""
        pieces = []
        while start < stop:
            number = bisect.bisect_right(self._starts, start) - 1
            piece_stop = min(stop, self._ends[number])
            pieces.append((number, start, piece_stop))
            start = piece_stop
        return pieces


class _Steps(NamedTuple):
    """The lattice of K columns and R rows: the numbers' steps from row to row and column to column, and inverses."""

    row: int
    column: int
    lead: int
    """Rows by which each column runs ahead of the one before: one walk over the numbers serves all columns."""
    turn: int
    """Columns by which a row of a block is turned against the same row of the block before."""


class _Pattern:
    """One phase's counts laid into the lattice; places are positions counted from the phase's start.

    A column's draws are counted along the walk ``w a mod M``, w = 0, 1, 2, ...: column x begins at w = ``x lead``. The
    draws of all columns are counted over the block's places 0 .. M - 1: row t of block b is row t of block 0, turned by
    ``b turn`` columns.
    """

    def __init__(self, slots: int, block: int, counts: IntArray) -> None:
        self._slots, self._block, self.counts = slots, block, counts
        self._steps = _lattice_steps(slots, block)
        self._first = np.cumsum(counts) - counts
        places = np.arange(block)
        numbers = np.cumsum(counts).searchsorted(np.arange(block), side="right")
        row, column = places // slots, places % slots
        self._along_walk = numbers[places * self._steps.row % block]
        self._walk, self._rank = self._grouped(self._along_walk)
        self._places, _ = self._grouped(numbers[(row * self._steps.row + column * self._steps.column) % block])

    def source_at(self, places: IntArray) -> IntArray:
        row, column = np.divmod(places, self._slots)
        source: IntArray = self._along_walk[(row + column * self._steps.lead) % self._block]
        return source

    def drawn_by_column(self, sources: IntArray, columns: IntArray, rows: IntArray) -> IntArray:
        """Draws of each source by each column in its first ``rows`` rows; int64 [k]."""
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
        blocks = np.minimum(blocks, _END // (self._block * self._slots) + 2)
        end = blocks * self._block + self._walk[self._first[source] + rank] - source * self._block
        places: IntArray = (end - begin) * self._slots + columns
        return places

    def place_of_draw(self, source: int, draws: IntArray) -> IntArray:
        """The place of the draw of the source that comes after ``draws`` others; int64 [k]."""
        blocks, rank = np.divmod(draws, self.counts[source])
        blocks = np.minimum(blocks, _END // self._block + 1)
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

    def _grouped(self, sources: IntArray) -> tuple[IntArray, IntArray]:
        """Where each source stands, as ascending ``source * M + index``; and each index's rank in its source."""
        order = np.argsort(sources, kind="stable")
        rank = np.empty(self._block, np.int64)
        rank[order] = np.arange(self._block) - self._first[sources[order]]
        return sources[order] * self._block + order, rank


@functools.lru_cache(maxsize=16)
def _lattice_steps(slots: int, block: int) -> _Steps:
    rows = block // slots
    row, column = even_step(block, (1, rows)), even_step(slots)
    lead = column * rows * pow(row, -1, block) % block
    return _Steps(row, column * rows % block, lead, row * pow(column, -1, slots) % slots)


@functools.lru_cache(maxsize=16)
def _stratum_step(slots: int) -> int:
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
