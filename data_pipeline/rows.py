"""Sequences of tokens where they lie in memory, so that they are copied once: into the batch that they become."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .permutation import IntArray

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Addresses = npt.NDArray[np.uint64]


class Part(NamedTuple):
    """Some of the rows and where they lie: row ``which[k]`` is ``memory[places[0][k], places[1][k], ...]``."""

    which: IntArray | slice
    """[k] or all,"""
    memory: Tokens
    """[..., T + 1], the tokens of a row side by side,"""
    places: tuple[IntArray, ...]
    """[k] for each axis of ``memory`` but the last."""


class Rows:
    """``n`` sequences of T tokens and the one that follows; as long-lived as what the memory of the parts holds.

    Args:
        count: n.
        parts: say of every row where it lies; each is named once.
    """

    def __init__(self, count: int, parts: Iterable[Part]) -> None:
        self._count, self._parts = count, tuple(parts)

    @classmethod
    def of(cls, tokens: Tokens) -> Rows:
        """The rows of an array [n, T + 1]."""
        whole = np.ascontiguousarray(tokens)
        return cls(len(whole), [Part(slice(None), whole, (np.arange(len(whole)),))])

    @property
    def length(self) -> int:
        """T + 1."""
        return int(self._parts[0].memory.shape[-1])

    @property
    def dtypes(self) -> set[np.dtype[Any]]:
        """Of the tokens: one, unless data sets of different ones are mixed."""
        return {part.memory.dtype for part in self._parts}

    def at(self, places: IntArray) -> list[Part]:
        """Their parts, where they are the rows ``places`` [n] of others."""
        return [part._replace(which=places[part.which]) for part in self._parts]

    def copy(self) -> Tokens:
        """A new array [n, T + 1]."""
        rows: Tokens = np.empty((self._count, self.length), np.result_type(*self.dtypes))
        for which, memory, places in self._parts:
            rows[which] = memory[places]
        return rows

    def addresses(self) -> Addresses:
        """Where the first token of each row lies [n]; the others follow."""
        found = np.empty(self._count, np.uint64)
        for which, memory, places in self._parts:
            found[which] = memory.ctypes.data + sum(
                along * stride for along, stride in zip(places, memory.strides[:-1], strict=True)
            )
        return found
