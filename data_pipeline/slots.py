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
from collections.abc import Sequence

import numpy as np

from .lattice import END, Lattice, stratum_step
from .mixture import MIXTURE_BLOCK, Phase, phase_counts
from .permutation import IntArray


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
        self._ends = [*self._starts[1:], END]
        lattices = {counts.tobytes(): Lattice(slots, self.block, counts) for _, counts in self.phases}
        self._lattices = [lattices[counts.tobytes()] for _, counts in self.phases]
        every = np.arange(len(self.phases[0][1]))
        self._stratum_step = stratum_step(slots)
        self._used = [np.zeros(len(every), np.int64)]
        for lattice, start, end in zip(self._lattices, self._starts, self._ends[:-1], strict=False):
            self._used.append(self._used[-1] + lattice.drawn(every, np.full(len(every), end - start)))

    def sources_at(self, start: int, count: int) -> IntArray:
        """The source of each of the positions ``start .. start + count - 1``; int64 [count]."""
        return np.concatenate(
            [
                self._lattices[number].source_at(np.arange(first - self._starts[number], stop - self._starts[number]))
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
        for lattice, start, end in zip(self._lattices[:begun], self._starts, self._ends, strict=False):
            columns = (positions - start) % self.slots
            rows = self._rows(np.minimum(positions, end) - start, columns)
            draws += lattice.drawn_by_column(sources, columns, rows)
        return draws

    def all_draws(self, positions: IntArray, sources: IntArray) -> IntArray:
        """How often all slots drew the source [k] before each position [k]; int64 [k]."""
        draws = np.empty(len(positions), np.int64)
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            drawn = self._lattices[number].drawn(sources[here], positions[here] - self._starts[number])
            draws[here] = self._used[number][sources[here]] + drawn
        return draws

    def position_of_slot_draw(self, source: int, slots: IntArray, draws: IntArray) -> IntArray:
        """Where slot [k] draws the source after ``draws`` [k] earlier times; int64 [k], -1 for never."""
        positions = np.full(len(draws), -1, np.int64)
        before = np.zeros(len(draws), np.int64)
        for lattice, start, end in zip(self._lattices, self._starts, self._ends, strict=True):
            if lattice.counts[source]:
                columns = (slots - start) % self.slots
                found = start + lattice.place_of_column_draw(source, columns, draws - before)
                positions = np.where((draws >= before) & (positions < 0) & (found < end), found, positions)
                rows = self._rows(end - start, columns)
                before += lattice.drawn_by_column(np.full(len(draws), source), columns, rows)
        return positions

    def position_of_draw(self, source: int, draws: IntArray) -> IntArray:
        """Where the source is drawn after ``draws`` [k] earlier times by all slots; int64 [k], -1 for never."""
        positions = np.full(len(draws), -1, np.int64)
        for lattice, start, end, used in zip(self._lattices, self._starts, self._ends, self._used, strict=True):
            if lattice.counts[source]:
                found = start + lattice.place_of_draw(source, draws - used[source])
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
