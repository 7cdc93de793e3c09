"""Rooms for batches that are used again; freed memory goes back to the system, and costs a fault a page anew."""

from __future__ import annotations

from collections import deque
from sys import getrefcount

import numpy as np

from .permutation import IntArray

_FREE = 4
"""Rooms that nobody uses are kept up to this number."""


class Room:
    """Memory for the rows of a batch, seen in three ways; each of the arrays counts who looks at it.

    Args:
        shape: (b, T + 1).

    Attributes:
        rows: int64 [b, T + 1], contiguous.
        tokens, labels: [b, T], views of the rows without their last and without their first.
        address: of the first token.
    """

    __slots__ = ("_idle", "address", "labels", "rows", "tokens")

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.rows: IntArray = np.empty(shape, np.int64)
        self.tokens, self.labels = self.rows[:, :-1], self.rows[:, 1:]
        self.address = self.rows.ctypes.data
        self._idle = 0
        self._idle = self._count()

    def is_free(self) -> bool:
        """Whether nobody but this room refers to one of the arrays, a view or a tensor of them."""
        return self._count() == self._idle

    def _count(self) -> int:
        # a view of a view refers to what owns the memory, a tensor to the array that it was made from
        return getrefcount(self.rows) + getrefcount(self.tokens) + getrefcount(self.labels)


class Recycled:
    """Makes rooms of one shape. One is given again when the last that refers to its arrays is gone, in any thread.

    Args:
        shape: (b, T + 1).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._rooms: deque[Room] = deque()
        """The one given last at the end."""

    def take(self) -> Room:
        """A room that shares no memory with any other whose arrays are in use; what stands in it is undefined."""
        rooms = self._rooms
        for _ in range(len(rooms)):
            room = rooms.popleft()
            rooms.append(room)
            if room.is_free():
                if len(rooms) > _FREE and rooms[0].is_free() and rooms[_FREE - 1].is_free():
                    rooms.popleft()
                return room
        rooms.append(room := Room(self.shape))
        return room
