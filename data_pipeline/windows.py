"""Where the strata and windows of a source lie: arithmetic, the same in every epoch.

A source of N sequences is cut into K strata, stratum i being ``[i N // K, (i + 1) N // K)``. A stratum is cut into
windows of W neighbouring sequences: the first one (its head) is shorter by an amount that depends on the stratum, so
that the slots, which each read one stratum, do not all change windows at once; the last one is what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import UserError
from .permutation import LARGEST, IntArray, mix64

BoolArray = npt.NDArray[np.bool_]

MOST_STRATA = 65_536
SMALLEST_STRATUM = 64
"""Sequences: a source that gives its strata fewer is not cut, but ordered as in ``full``."""


class Strata(NamedTuple):
    """Strata of sources; int64 [k] each. Places in a stratum are counted from ``first``."""

    first: IntArray
    """Their first sequences."""
    size: IntArray
    head: IntArray
    """The length of their first window; may be 0."""
    whole: IntArray
    """How many whole windows follow the head."""


class Window(NamedTuple):
    """Windows of strata; int64 [k] each, ``is_whole`` bool [k]."""

    begin: IntArray
    """Their first places."""
    length: IntArray
    number: IntArray
    """Which of the whole windows it is; 0 for a head or a tail."""
    is_whole: BoolArray


@dataclass(frozen=True)
class Windows:
    """How the order ``windowed`` cuts sources.

    Args:
        strata: K. With a global batch that K divides, and ranks times micro-batch dividing K, each window is read by
            one rank.
        sequences: W, the sequences of a window: what is fetched at once.

    Raises:
        UserError: a number out of bounds.
    """

    strata: int
    sequences: int

    def __post_init__(self) -> None:
        if not 1 <= self.strata <= MOST_STRATA:
            raise UserError(
                f"the windowed order can't have {self.strata} strata. Give 1 to {MOST_STRATA}; best the global batch, "
                "or a divisor of it that all ranks' micro-batches together divide."
            )
        if not 1 <= self.sequences <= LARGEST:
            raise UserError(
                f"a window can't hold {self.sequences} sequences. Give 1 or more: what should be fetched at once, "
                "some MB."
            )

    def cuts(self, sequences: IntArray) -> BoolArray:
        """Which sources of so many sequences [k] are cut into strata; bool [k]."""
        return sequences // self.strata >= SMALLEST_STRATUM

    def strata_at(self, sequences: IntArray | int, stratum: IntArray) -> Strata:
        """The strata number ``stratum`` [k] of sources with so many sequences (each, or all alike)."""
        first = self._bound(sequences, stratum)
        size = self._bound(sequences, stratum + 1) - first
        head = (mix64(stratum.astype(np.uint64)) % np.uint64(self.sequences)).astype(np.int64)
        head = np.minimum(head, size)
        return Strata(first, size, head, (size - head) // self.sequences)

    def stratum_of(self, sequences: int, sequence: IntArray) -> IntArray:
        """The number of the stratum that each sequence [k] of a source that is cut lies in; int64 [k]."""
        # off by one at most: the quotient is rounded to 53 bits, K has at most 16, and a stratum some sequences
        guess = np.minimum((sequence / sequences * self.strata).astype(np.int64), self.strata - 1)
        guess -= sequence < self._bound(sequences, guess)
        guess += sequence >= self._bound(sequences, guess + 1)
        return guess

    def window_at(self, strata: Strata, place: IntArray) -> Window:
        """The window that each place [k] of the strata [k] lies in."""
        number, in_head = (place - strata.head) // self.sequences, place < strata.head
        begin = np.where(in_head, 0, strata.head + number * self.sequences)
        length = np.where(in_head, strata.head, np.minimum(strata.size - begin, self.sequences))
        is_whole = ~in_head & (number < strata.whole)
        return Window(begin, length, np.where(is_whole, number, 0), is_whole)

    def _bound(self, sequences: IntArray | int, stratum: IntArray) -> IntArray:
        """``sequences * stratum // K`` without leaving 64 bits."""
        quotient, rest = np.divmod(sequences, self.strata)
        return stratum * quotient + stratum * rest // self.strata
