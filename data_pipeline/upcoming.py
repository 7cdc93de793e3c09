"""The steps that come next, with what they need already on its way from remote storage."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from .order import Order
from .permutation import IntArray
from .reader import TokenSource
from .schedule import LocatedStep, Schedule

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
        self._coming: deque[LocatedStep] = deque()
        """Steps whose windows are there or on their way."""
        self._later: deque[LocatedStep] = deque()
        self._positions = 0

    def _first(self) -> LocatedStep:
        if self._remote:
            self._fetch_ahead()
        if not self._coming:
            if not self._later and not self._locate():
                raise StopIteration
            self._coming.append(self._later.popleft())
        return self._coming[0]

    def take(self, sequences: int) -> list[LocatedStep]:
        """The next steps: of together at most ``sequences`` sequences of this rank, but at least one; only one where
        something must be fetched.

        Raises:
            StopIteration: there is none.
        """
        steps = [self._next()]
        left = 0 if self._remote else sequences - steps[0].positions.size
        while left > 0 and (self._later or self._locate()) and self._later[0].positions.size <= left:
            steps.append(self._next())
            left -= steps[-1].positions.size
        return steps

    def _next(self) -> LocatedStep:
        step = self._first()
        self._positions -= self._coming.popleft().global_batch
        return step

    def _locate(self) -> bool:
        chunk = self._schedule.next_chunk()
        self._later.extend(chunk)
        self._positions += sum(step.global_batch for step in chunk)
        return bool(chunk)

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

    def _begin(self, step: LocatedStep) -> bool:
        sources, sequences = step.source.ravel(), step.sequence.ravel()
        for number in np.unique(sources).tolist():
            wanted = sequences[sources == number]
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
