"""The order ``windowed``: every source is read window by window, and every window is entered once an epoch.

Each slot of the mixture (:mod:`~data_pipeline.slots`) reads one stratum of every source
(:mod:`~data_pipeline.windows`), so that K positions in a row draw from all over it: more evenly than a full shuffle.
Draw n of a stratum of m
sequences is draw ``n mod m`` of its epoch ``n // m``. An epoch visits the head, the whole windows in the order of a
keyed permutation, and what is left at the end; a keyed permutation orders each window's sequences. A source too small
for K strata is ordered as in ``full``.

Keys hang on seed, source NAME, epoch, and stratum or window, never on the mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .full import FullEpochs
from .mixture import Phase
from .permutation import LARGEST, IntArray, UIntArray, epoch_keys, invert, permute
from .slots import SlotMixture
from .windows import Strata, Window, Windows


class Windowed:
    """Position -> (source, epoch, sequence) and back.

    Args:
        seed: the run's seed.
        sizes: the sequences of every source, by name.
        phases: of the mixture, the first at 0.
        windows: how sources are cut.

    Raises:
        UserError: weights or phases that :class:`SlotMixture` refuses.
    """

    def __init__(self, seed: int, sizes: Mapping[str, int], phases: Sequence[Phase], windows: Windows) -> None:
        self._mixture = SlotMixture(windows.strata, phases)
        self.block, self.phases = self._mixture.block, self._mixture.phases
        self._seed, self._names, self._windows = seed, tuple(sizes), windows
        self._sizes = np.array(list(sizes.values()), np.int64)
        self._cut = windows.cuts(self._sizes)
        self._uncut = FullEpochs(seed, sizes)

    def locate(self, start: int, count: int) -> tuple[IntArray, IntArray, IntArray]:
        """Source, epoch and sequence of the positions ``start .. start + count - 1``; int64 [count] each."""
        position = np.arange(start, start + count, dtype=np.int64)
        source = self._mixture.sources_at(start, count)
        epoch, sequence = np.empty(count, np.int64), np.empty(count, np.int64)
        cut = self._cut[source]
        for here, locate in ((np.flatnonzero(cut), self._locate_cut), (np.flatnonzero(~cut), self._locate_uncut)):
            if here.size:
                epoch[here], sequence[here] = locate(source[here], position[here])
        return source, epoch, sequence

    def position_of(self, source: int, sequence: IntArray, epoch: IntArray) -> IntArray:
        """The positions at which the sequences [k] come in the epochs [k]; int64 [k], -1 for never."""
        if not self._cut[source]:
            return self._mixture.position_of_draw(source, self._uncut.draw_of(source, sequence, epoch))
        stratum = self._windows.stratum_of(int(self._sizes[source]), sequence)
        strata = self._windows.strata_at(int(self._sizes[source]), stratum)
        window = self._windows.window_at(strata, sequence - strata.first)
        keys = self._keys(np.full(len(sequence), source), epoch)
        first = strata.first + window.begin
        inside = invert(sequence - first, window.length, keys, numbers=self._mixture.slots + first)
        visit = self._begin(strata, window, keys, stratum, inverse=True)
        draw = epoch * strata.size + visit + inside
        return self._mixture.position_of_slot_draw(source, self._mixture.slot_of(stratum), draw)

    def needed(self, end: int) -> IntArray:
        """How many sequences of each source the positions ``[0, end)`` draw; int64 [S]."""
        every = np.arange(len(self._sizes))
        return self._mixture.all_draws(np.full(len(every), end), every)

    def reads(self, source: int, sequence: IntArray, start: int, end: int) -> int:
        """How many of the positions ``start .. end - 1`` hold one of a source's sequences [k]."""
        if not self._cut[source]:
            first, stop = (int(self.needed(position)[source]) for position in (start, end))
            return self._uncut.reads(source, sequence, first, stop)
        found = 0
        for epoch in range(int(self._epochs_at(source, start).min()), int(self._epochs_at(source, end).max()) + 1):
            positions = self.position_of(source, sequence, np.full(len(sequence), epoch))
            found += int(((positions >= start) & (positions < end)).sum())
        return found

    def _epochs_at(self, source: int, position: int) -> IntArray:
        """The epoch of each slot's stratum of the source of its first draw from ``position`` on; int64 [K].

        Strata differ in length by one, so their epochs drift apart.
        """
        slots = np.arange(self._mixture.slots)
        size = self._windows.strata_at(int(self._sizes[source]), self._mixture.stratum_of(slots)).size
        drawn = self._mixture.slot_draws(position + (slots - position) % len(slots), np.full(len(slots), source))
        epochs: IntArray = drawn // size
        return epochs

    def repeats_at(self, source: int, epochs: int, end: int) -> int | None:
        """The first position below ``end`` that reads a part of the source for more than ``epochs`` epochs."""
        if not self._cut[source]:
            allowed = epochs * int(self._sizes[source])
            if int(self.needed(end)[source]) <= allowed:
                return None
            return int(self._mixture.position_of_draw(source, np.array([allowed]))[0])
        slots = np.arange(self._mixture.slots)
        size = self._windows.strata_at(int(self._sizes[source]), self._mixture.stratum_of(slots)).size
        epochs = min(epochs, LARGEST // int(size.max()))
        ends = end + (slots - end) % self._mixture.slots
        over = np.flatnonzero(self._mixture.slot_draws(ends, np.full(len(slots), source)) > epochs * size)
        if not over.size:
            return None
        return int(self._mixture.position_of_slot_draw(source, over, epochs * size[over]).min())

    def window(self, source: int, sequences: IntArray) -> tuple[IntArray, IntArray]:
        """First and stop of the window that each sequence [k] lies in: what is fetched at once; int64 [k] each."""
        size = int(self._sizes[source])
        if not self._cut[source]:
            return np.zeros_like(sequences), np.full_like(sequences, size)
        strata = self._windows.strata_at(size, self._windows.stratum_of(size, sequences))
        window = self._windows.window_at(strata, sequences - strata.first)
        return strata.first + window.begin, strata.first + window.begin + window.length

    def _locate_cut(self, source: IntArray, position: IntArray) -> tuple[IntArray, IntArray]:
        stratum = self._mixture.stratum_of(position)
        strata = self._windows.strata_at(self._sizes[source], stratum)
        epoch, visit = np.divmod(self._mixture.slot_draws(position, source), strata.size)
        visited = self._windows.window_at(strata, visit)
        keys = self._keys(source, epoch)
        first = strata.first + self._begin(strata, visited, keys, stratum, inverse=False)
        inside = permute(visit - visited.begin, visited.length, keys, numbers=self._mixture.slots + first)
        return epoch, first + inside

    def _locate_uncut(self, source: IntArray, position: IntArray) -> tuple[IntArray, IntArray]:
        return self._uncut.locate(source, self._mixture.all_draws(position, source))

    def _begin(self, strata: Strata, window: Window, keys: UIntArray, stratum: IntArray, *, inverse: bool) -> IntArray:
        """The first place of the window visited as which ``window`` counts, or (inverse) the other way round."""
        change = invert if inverse else permute
        number = change(window.number, np.maximum(strata.whole, 1), keys, numbers=stratum)
        return np.where(window.is_whole, strata.head + number * self._windows.sequences, window.begin)

    def _keys(self, source: IntArray, epoch: IntArray) -> UIntArray:
        """Where each source's streams of keys begin in its epoch; uint64 [k, 8].

        The outputs below K order the windows of the strata, those from K on the insides: K + a window's first sequence.
        """
        return epoch_keys(self._seed, "windows", self._names, source, epoch)
