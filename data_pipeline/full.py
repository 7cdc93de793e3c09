"""The order ``full``: any sequence of a source may come at any place of its epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .mixture import MIXTURE_BLOCK, Mixture, Phase
from .permutation import IntArray, epoch_keys, invert, permute

_PURPOSE = "sequences"


class FullEpochs:
    """Draw j of a source of N sequences is draw ``j mod N`` of its epoch ``j // N``; a keyed permutation picks it."""

    def __init__(self, seed: int, sizes: Mapping[str, int]) -> None:
        self._seed, self._names = seed, tuple(sizes)
        self._sizes = np.array(list(sizes.values()), np.int64)

    def locate(self, source: IntArray, draw: IntArray) -> tuple[IntArray, IntArray]:
        """Epoch and sequence of the draws [k] of the sources [k]; int64 [k] each."""
        sizes = self._sizes[source]
        epoch, index = np.divmod(draw, sizes)
        return epoch, permute(index, sizes, epoch_keys(self._seed, _PURPOSE, self._names, source, epoch))

    def draw_of(self, source: int, sequence: IntArray, epoch: IntArray) -> IntArray:
        """The draws that hold the sequences [k] of one source in the epochs [k]; int64 [k]."""
        size = int(self._sizes[source])
        keys = epoch_keys(self._seed, _PURPOSE, self._names, np.full(len(epoch), source), epoch)
        return epoch * size + invert(sequence, size, keys)

    def reads(self, source: int, sequence: IntArray, first: int, stop: int) -> int:
        """How many of the draws ``first .. stop - 1`` of one source hold one of the sequences [k]."""
        size = int(self._sizes[source])

        def drawn(epoch: int) -> int:
            draws = self.draw_of(source, sequence, np.full(len(sequence), epoch))
            return int(((draws >= first) & (draws < stop)).sum())

        begin, end = first // size, stop // size
        return drawn(begin) if begin == end else drawn(begin) + (end - begin - 1) * len(sequence) + drawn(end)


class Full:
    """Position -> (source, epoch, sequence) and back.

    Args:
        seed: the run's seed.
        sizes: the sequences of every source, by name.
        phases: of the mixture, the first at 0.

    Raises:
        UserError: weights or phases that :class:`Mixture` refuses.
    """

    def __init__(self, seed: int, sizes: Mapping[str, int], phases: Sequence[Phase]) -> None:
        self._mixture = Mixture(seed, phases)
        self.block, self.phases = MIXTURE_BLOCK, self._mixture.spans
        self._epochs = FullEpochs(seed, sizes)
        self._sizes = tuple(sizes.values())

    def locate(self, start: int, count: int) -> tuple[IntArray, IntArray, IntArray]:
        """Source, epoch and sequence of the positions ``start .. start + count - 1``; int64 [count] each."""
        source, draw = self._mixture.locate(start, count)
        return source, *self._epochs.locate(source, draw)

    def position_of(self, source: int, sequence: IntArray, epoch: IntArray) -> IntArray:
        """The positions at which the sequences [k] come in the epochs [k]; int64 [k], -1 for never."""
        return self._mixture.position_of(source, self._epochs.draw_of(source, sequence, epoch))

    def needed(self, end: int) -> IntArray:
        """How many sequences of each source the positions ``[0, end)`` draw; int64 [S]."""
        return self._mixture.needed(end)

    def reads(self, source: int, sequence: IntArray, start: int, end: int) -> int:
        """How many of the positions ``start .. end - 1`` hold one of a source's sequences [k]."""
        first, stop = (int(self.needed(position)[source]) for position in (start, end))
        return self._epochs.reads(source, sequence, first, stop)

    def repeats_at(self, source: int, epochs: int, end: int) -> int | None:
        """The first position below ``end`` that reads the source for more than ``epochs`` epochs; None: none does."""
        allowed = epochs * self._sizes[source]
        if int(self.needed(end)[source]) <= allowed:
            return None
        return int(self._mixture.position_of(source, np.array([allowed]))[0])

    def window(self, source: int, sequences: IntArray) -> tuple[IntArray, IntArray]:
        """The source itself is the window of each of its sequences [k]: first and stop, int64 [k] each."""
        return np.zeros_like(sequences), np.full_like(sequences, self._sizes[source])
