"""The steps that come next, with what they need already on its way from remote storage."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from .order import Order
from .permutation import IntArray
from .reader import TokenSource
from .schedule import Schedule, Steps

_LOOK_AHEAD = 1 << 17
"""Positions located ahead at most in search of something to fetch,"""
_CHUNKS = 2
"""and chunks of them at most before a step is handed out."""
_NEIGHBOURS = 1024
"""Sequences fetched together where they are read in index order."""


class Upcoming:
    """The steps of a schedule, one after the other; fetches ahead as far as the connections can be kept at work."""

    def __init__(self, schedule: Schedule, order: Order, sources: Sequence[TokenSource]) -> None:
        self._schedule, self._order, self._sources = schedule, order, sources
        self._remote = any(source.remote for source in sources)
        self._coming: deque[Steps] = deque()
        """Single steps whose windows are there or on their way."""
        self._later: deque[Steps] = deque()
        """Those that come then; where nothing is fetched, all that were located together."""
        self._positions = 0

    def take(self, sequences: int) -> Steps:
        """The next steps: of together at most ``sequences`` sequences of this rank, but at least one; only one where
        something must be fetched.

        Raises:
            StopIteration: there is none.
        """
        if self._remote:
            self._fetch_ahead()
            if self._coming:
                return self._taken(self._coming.popleft())
        if not self._later and not self._locate():
            raise StopIteration
        steps = self._later.popleft()
        count = max(1, sequences // steps.sequences)
        if count < len(steps):
            self._later.appendleft(steps.part(count, len(steps)))
            steps = steps.part(0, count)
        return self._taken(steps)

    def _taken(self, steps: Steps) -> Steps:
        self._positions -= len(steps) * steps.global_batch
        return steps

    def _locate(self) -> bool:
        chunk = self._schedule.next_chunk()
        if chunk is None:
            return False
        self._later.extend((chunk.part(k, k + 1) for k in range(len(chunk))) if self._remote else [chunk])
        self._positions += len(chunk) * chunk.global_batch
        return True

    def _fetch_ahead(self) -> None:
        chunks = 0
        while True:
            if not self._later:
                chunks += 1
                if chunks > _CHUNKS or self._positions >= _LOOK_AHEAD or not self._locate():
                    return
            if not self._begin(self._later[0]):
                return
            self._coming.append(self._later.popleft())

    def _begin(self, step: Steps) -> bool:
        for number in np.unique(step.source).tolist():
            wanted = step.sequence[step.source == number]
            windows = windows_of(self._order, self._sources, number, wanted)
            if windows is not None and not self._sources[number].fetch_ahead(wanted, windows):
                return False
        return True


def windows_of(order: Order, sources: Sequence[TokenSource], number: int, sequences: IntArray) -> IntArray | None:
    """First and stop of what is fetched together with each sequence [n] of a source, int64 [2, n]; None: nothing is."""
    return np.stack(order.window(number, sequences)) if sources[number].remote else None


def neighbours(source: TokenSource, sequences: IntArray) -> IntArray:
    """As :func:`windows_of`, where sequences are read in index order; int64 [2, n]."""
    first = sequences // _NEIGHBOURS * _NEIGHBOURS
    return np.stack([first, np.minimum(first + _NEIGHBOURS, source.sequences)])
