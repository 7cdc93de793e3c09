"""Best-fit packing: documents into rows of a fixed length, none cut that fits into one.

Best-fit decreasing (Johnson, Demers, Ullman, Garey and Graham, 1974): the longest document first, each into the fullest
row that still has room. Its rows are at most 11/9 of the fewest possible plus a constant (Johnson, 1973). "Fewer
Truncations Improve Language Modeling" (Ding et al., 2024, arXiv:2404.10830) shows what it does for language models.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Where documents lie in a stream of rows.

    Attributes:
        order: [documents] the numbers of the documents in the order of the stream.
        starts: [documents] the first token of each, in that order; what lies between two documents is filling.
        tokens: length of the stream: whole rows.
    """

    order: IntArray
    starts: IntArray
    tokens: int


def end_to_end(lengths: IntArray) -> Packing:
    """Documents one after another without filling: the packing called ``concat``."""
    return Packing(np.arange(len(lengths)), np.cumsum(lengths) - lengths, int(lengths.sum()))


def best_fit(lengths: IntArray, row_tokens: int) -> Packing:
    """Pack documents into rows of ``row_tokens``; O(n log n) in the number of documents.

    A document longer than a row begins a row of its own, fills whole rows, and its tail begins the next, which takes
    further documents. Should the tail be its EOS alone, filling before the document makes it two tokens, so that no row
    is without a token to learn. Among rows that are equally full, the first opened is taken; among documents of equal
    length, the first. Rows stand in the order of the first document in each, documents in a row in their own order.

    Args:
        lengths: [documents] tokens of each document, its EOS included, at least 2; in shuffle order.
        row_tokens: at least 2.
    """
    bins: list[list[int]] = []
    rooms = _Rooms()
    sizes = lengths.tolist()
    for document in np.flatnonzero(lengths > row_tokens).tolist():
        room = -(sizes[document] + _shift(sizes[document], row_tokens)) % row_tokens
        bins.append([document])
        rooms.add(len(bins) - 1, room)
    whole = np.flatnonzero(lengths <= row_tokens)
    for document in whole[np.argsort(-lengths[whole], kind="stable")].tolist():
        number, room = rooms.take(sizes[document])
        if number is None:
            number, room = len(bins), row_tokens
            bins.append([])
        bins[number].append(document)
        rooms.add(number, room - sizes[document])
    order: list[int] = []
    starts: list[int] = []
    begin = 0
    for _, members in sorted((min(members), members) for members in bins):
        place = begin
        for document in _in_row(members, sizes, row_tokens):
            place += _shift(sizes[document], row_tokens)
            order.append(document)
            starts.append(place)
            place += sizes[document]
        begin = -(-place // row_tokens) * row_tokens
    return Packing(np.array(order, np.int64), np.array(starts, np.int64), begin)


class _Rooms:
    """Rows by the room they have left."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._rows: dict[int, list[int]] = {}

    def add(self, row: int, room: int) -> None:
        if room not in self._rows:
            insort(self._sizes, room)
            self._rows[room] = []
        heappush(self._rows[room], row)

    def take(self, needed: int) -> tuple[int | None, int]:
        """The first opened of the rows with the least room that is enough, and its room; it is taken out."""
        place = bisect_left(self._sizes, needed)
        if place == len(self._sizes):
            return None, 0
        room = self._sizes[place]
        row = heappop(self._rows[room])
        if not self._rows[room]:
            del self._rows[room], self._sizes[place]
        return row, room


def _shift(length: int, row_tokens: int) -> int:
    """Filling before a document: 1 where its EOS would stand alone in a row of its own."""
    return int(length > row_tokens and length % row_tokens == 1)


def _in_row(members: list[int], sizes: list[int], row_tokens: int) -> Iterator[int]:
    """A document that began in earlier rows comes first."""
    return iter(sorted(members, key=lambda document: (sizes[document] <= row_tokens, document)))
