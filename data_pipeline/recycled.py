"""Arrays whose memory is used again: the system takes back what is freed, and to get it anew costs a fault a page."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_FREE = 4
"""Arrays that nobody uses are kept up to this number."""


class Recycled:
    """Makes arrays of one shape. What is made comes back by itself when the last view of it is gone, in any thread.

    Args:
        shape: of each.
        dtype: of each.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape, self._dtype = shape, np.dtype(dtype)
        self._free: list[tuple[npt.NDArray[Any], dict[str, Any]]] = []

    def take(self) -> npt.NDArray[Any]:
        """An array that shares no memory with any other that is in use; what stands in it is undefined."""
        try:
            memory = self._free.pop()
        except IndexError:
            array = np.empty(self.shape, self._dtype)
            memory = array, array.__array_interface__  # making it is what costs
        return np.asarray(_Loan(self._free, memory))


class _Loan:
    """What the views of a lent array hold on to; numpy keeps it as their base."""

    __slots__ = ("__array_interface__", "_free", "_memory")

    def __init__(
        self, free: list[tuple[npt.NDArray[Any], dict[str, Any]]], memory: tuple[npt.NDArray[Any], dict[str, Any]]
    ) -> None:
        self._free, self._memory, self.__array_interface__ = free, memory, memory[1]

    def __del__(self) -> None:
        if len(self._free) < _FREE:
            self._free.append(self._memory)
