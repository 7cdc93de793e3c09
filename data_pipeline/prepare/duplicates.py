"""Between the passes: which documents are duplicates, and which one of each group stays.

A document's number is the place of its run among all runs plus its row. Numbers depend on how the input was cut into
parts, so nothing else may depend on them: groups are ordered by *priority*, which hangs on content and origin alone:
held-out documents first (training text that repeats held-out text goes, never the other way), then the order of the
sources in the configuration, the shuffle key, the content hash, the url, the metadata.

Exact duplicates have equal content hashes, hence equal keys, and runs are sorted by key: ranges of keys are compared
one after another. Near duplicates of what is left are looked for band by band, ranges of band hashes one after
another; documents of equal hash are compared by their signatures with the first of their group by priority, those
unlike it again among themselves, so that of those that stay no two in a group are alike. The pairs found in all
bands make a graph; of each connected component the first by priority stays.

Limits. Memory: about 100 bytes a document of a range (``RANGE_DOCUMENTS`` bounds a range: 1 GB), 100 MB of signatures
that are compared, and about 100 bytes a document that has a duplicate, whatever the number of all documents
(`benchmarks/cleaning_speed.py` measures it). Reading: every band's hashes once per range, 8 bytes a document each, and
the signatures of the documents that share a band with another one, at random. Finding equal text and choosing are one
job each, the bands one job a band; each job reads all runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..cleaning.near_duplicates import Signature, agreement, connected_components
from .checked_files import CheckedRows, check_pieces, opened, publish_rows, read_piece
from .runs import DROP_DTYPE, RUN_DTYPE

Ints = npt.NDArray[np.int64]

RANGE_DOCUMENTS = 10_000_000
_COMPARED_AT_ONCE = 1 << 16

EXACT, NEAR = 1, 2

PAIR_DTYPE = np.dtype([("document", "<i8"), ("kept", "<i8")])
"""A document's number and that of the one it repeats."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run as the comparison needs them. Who reads them may get a :class:`DamagedFileError`.

    Attributes:
        path: their common path without suffixes; ``.minhash`` and ``.bands`` only for near duplicates.
        source: the place of its source in the configuration.
        train: rows of training documents; held-out ones follow. Both are sorted by key.
        documents: all rows.
    """

    path: str
    source: int
    train: int
    documents: int

    def table(self) -> CheckedRows:
        """[documents] the run's table."""
        return CheckedRows(f"{self.path}.docs", RUN_DTYPE, self.documents)

    def signatures(self, permutations: int) -> CheckedRows:
        """[documents, permutations] uint32."""
        return CheckedRows(f"{self.path}.minhash", (np.uint32, (permutations,)), self.documents)

    def band(self, number: int) -> npt.NDArray[np.uint64]:
        """[documents] the hash of each in one band."""
        first = number * self.documents
        hashes: npt.NDArray[np.uint64] = CheckedRows(f"{self.path}.bands", np.uint64).rows(
            first, first + self.documents
        )
        return hashes

    def key_range(self, index: int, count: int) -> Iterator[tuple[int, int]]:
        """First and last row of the training, then of the held-out documents with keys in range ``index`` of
        ``count``; costs what they hold."""
        table = self.table()
        for begin, end in ((0, self.train), (self.train, self.documents)):
            first = table.place("key", (index << 64) // count, begin, end)
            yield first, table.place("key", (index + 1 << 64) // count, first, end)


class Corpus:
    """All runs, and their documents by number. ``permutations``: of their signatures, if they have some."""

    def __init__(self, runs: Sequence[RunFiles], permutations: int = 0) -> None:
        self.runs, self.permutations = tuple(runs), permutations
        self.offsets: Ints = np.concatenate([[0], np.cumsum([run.documents for run in runs])]).astype(np.int64)

    @property
    def documents(self) -> int:
        """How many there are."""
        return int(self.offsets[-1])

    def by_run(self, numbers: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        """For each run with some of ``numbers``: the run, their places in ``numbers``, and their rows, ascending."""
        order = np.argsort(numbers, kind="stable")
        ascending = numbers[order]
        owner = np.searchsorted(self.offsets, ascending, side="right") - 1
        for run in np.unique(owner).tolist():
            first, last = np.searchsorted(owner, [run, run + 1])
            yield run, order[first:last], ascending[first:last] - self.offsets[run]

    def heldout(self, numbers: Ints) -> npt.NDArray[np.bool_]:
        """Whether each document is held out."""
        train = np.array([run.train for run in self.runs], np.int64)
        owner = np.searchsorted(self.offsets, numbers, side="right") - 1
        heldout: npt.NDArray[np.bool_] = numbers - self.offsets[owner] >= train[owner]
        return heldout

    def ids(self, numbers: Ints) -> list[bytes]:
        """The content hash of each document."""
        found: list[bytes] = [b""] * len(numbers)
        for run, places, rows in self.by_run(numbers):
            for place, identity in zip(places.tolist(), self.runs[run].table().take(rows)["id"], strict=True):
                found[place] = identity.tobytes()
        return found

    def texts(self, numbers: Ints, column: Literal["url", "metadata"]) -> list[bytes]:
        """What each document's run holds beside its tokens."""
        found: list[bytes] = [b""] * len(numbers)
        for run, places, rows in self.by_run(numbers):
            table = self.runs[run].table().take(rows)
            path = f"{self.runs[run].path}.{'urls' if column == 'url' else column}"
            starts, sizes = table[f"{column}_start"].tolist(), table[f"{column}_bytes"].tolist()
            with opened(path) as handle:
                texts = [read_piece(handle, start, size) for start, size in zip(starts, sizes, strict=True)]
            check_pieces(path, texts, table[f"{column}_crc32c"])
            for place, text in zip(places.tolist(), texts, strict=True):
                found[place] = text
        return found

    def signatures(self, numbers: Ints) -> Signature:
        """[numbers, permutations] the signature of each document."""
        found: Signature = np.empty((len(numbers), self.permutations), np.uint32)
        for run, places, rows in self.by_run(numbers):
            found[places] = self.runs[run].signatures(self.permutations).take(rows)
        return found

    def by_priority(self, numbers: Ints, groups: Ints) -> Ints:
        """The order that sorts ``numbers`` by ``groups`` (any integers), and within a group by priority."""
        traits = np.zeros(len(numbers), [("train", "?"), ("source", "<i8"), ("key", "<u8"), ("id", ">u8", (2,))])
        for run, places, rows in self.by_run(numbers):
            table = self.runs[run].table().take(rows)
            traits["train"][places] = rows < self.runs[run].train
            traits["source"][places] = self.runs[run].source
            traits["key"][places] = table["key"]
            traits["id"][places] = np.ascontiguousarray(table["id"]).view(">u8")
        columns = (traits["id"][:, 1], traits["id"][:, 0], traits["key"], traits["source"], traits["train"], groups)
        order: Ints = np.lexsort(columns)
        tied = np.all([column[order][1:] == column[order][:-1] for column in columns], axis=0)
        same_as_last = np.append(np.zeros(min(1, len(order)), bool), tied)
        begins = np.flatnonzero(~same_as_last)
        sizes = np.diff(np.append(begins, len(order)))
        tied_places = np.flatnonzero(np.repeat(sizes > 1, sizes))
        tied_numbers = numbers[order[tied_places]]
        urls, metadata = self.texts(tied_numbers, "url"), self.texts(tied_numbers, "metadata")
        ranks = dict(zip(tied_places.tolist(), zip(urls, metadata, tied_numbers.tolist(), strict=True), strict=True))
        for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            order[begin : begin + size] = order[sorted(range(begin, begin + size), key=ranks.__getitem__)]
        return order


def exact_duplicates(corpus: Corpus, range_documents: int = RANGE_DOCUMENTS) -> npt.NDArray[np.void]:
    """:data:`PAIR_DTYPE` for every document whose text another one of higher priority has, by document number."""
    found: list[npt.NDArray[np.void]] = []
    count = -(-corpus.documents // range_documents)
    for k in range(count):
        numbers, ids = _key_range(corpus, k, count)
        order = np.lexsort((ids[:, 1], ids[:, 0]))
        members, groups = _shared(numbers[order], np.any(ids[order][1:] != ids[order][:-1], axis=1))
        order = corpus.by_priority(members, groups)
        members, kept = members[order], members[order][_firsts(groups[order])]
        found.append(_pairs(members[members != kept], kept[members != kept]))
    return np.sort(np.concatenate([np.zeros(0, PAIR_DTYPE), *found]), order="document")


def band_matches(
    corpus: Corpus, band: int, dropped: Ints, threshold: float, range_documents: int = RANGE_DOCUMENTS
) -> npt.NDArray[np.void]:
    """:data:`PAIR_DTYPE` for documents that agree in ``band`` and in ``threshold`` of their signatures.

    ``dropped``: numbers of documents to leave out, ascending.
    """
    found: list[npt.NDArray[np.void]] = []
    count = -(-corpus.documents // range_documents)
    for k in range(count):
        numbers, hashes = _hash_range(corpus, band, dropped, k, count)
        order = np.argsort(hashes, kind="stable")
        members, groups = _shared(numbers[order], hashes[order][1:] != hashes[order][:-1])
        order = corpus.by_priority(members, groups)
        members, groups = members[order], groups[order]
        while len(members):
            first = members[_firsts(groups)]
            alike = _alike(corpus, members, first, threshold)
            matched = alike & (members != first)
            found.append(_pairs(members[matched], first[matched]))
            members, groups = _shared(members[~alike], groups[~alike][1:] != groups[~alike][:-1])
    return np.concatenate([np.zeros(0, PAIR_DTYPE), *found])


def choose(corpus: Corpus, matches: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """:data:`PAIR_DTYPE` for every document of the graph ``matches`` but the first by priority of each component."""
    nodes, edges = np.unique(np.concatenate([matches["document"], matches["kept"]]), return_inverse=True)
    components = connected_components(edges[: len(matches)], edges[len(matches) :], len(nodes))
    order = corpus.by_priority(nodes, components)
    members = nodes[order]
    kept = members[_firsts(components[order])]
    return np.sort(_pairs(members[members != kept], kept[members != kept]), order="document")


def write_drops(corpus: Corpus, exact: npt.NDArray[np.void], near: npt.NDArray[np.void]) -> None:
    """Publish ``.drop`` (:data:`.runs.DROP_DTYPE`, by row) beside every run; no document is in both lists."""
    stages = np.repeat([EXACT, NEAR], [len(exact), len(near)])
    pairs = np.concatenate([exact, near])
    order = np.argsort(pairs["document"])
    pairs, stages = pairs[order], stages[order]
    cuts = np.searchsorted(pairs["document"], corpus.offsets)
    for number, run in enumerate(corpus.runs):
        own = slice(cuts[number], cuts[number + 1])
        drops = np.zeros(cuts[number + 1] - cuts[number], DROP_DTYPE)
        drops["row"] = pairs["document"][own] - corpus.offsets[number]
        drops["stage"] = stages[own]
        drops["kept"] = pairs["kept"][own]
        publish_rows(Path(f"{run.path}.drop"), drops)


def _key_range(corpus: Corpus, k: int, count: int) -> tuple[Ints, npt.NDArray[np.uint64]]:
    """Numbers and ids [documents, 2] of the documents whose key lies in range ``k`` of ``count``."""
    numbers: list[Ints] = [np.zeros(0, np.int64)]
    ids: list[npt.NDArray[np.uint64]] = [np.zeros((0, 2), np.uint64)]
    for offset, run in zip(corpus.offsets.tolist(), corpus.runs, strict=False):
        table = run.table()
        for first, last in run.key_range(k, count):
            numbers.append(np.arange(offset + first, offset + last))
            ids.append(np.ascontiguousarray(table.rows(first, last)["id"]).view("<u8"))
    return np.concatenate(numbers), np.concatenate(ids)


def _hash_range(corpus: Corpus, band: int, dropped: Ints, k: int, count: int) -> tuple[Ints, npt.NDArray[np.uint64]]:
    """Numbers and hashes in ``band`` of the documents whose hash lies in range ``k`` of ``count``."""
    numbers: list[Ints] = [np.zeros(0, np.int64)]
    hashes: list[npt.NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    low, high = np.uint64((k << 64) // count), np.uint64(((k + 1 << 64) // count) - 1)
    for offset, run in zip(corpus.offsets.tolist(), corpus.runs, strict=False):
        own = run.band(band)
        inside = (own >= low) & (own <= high)
        first, last = np.searchsorted(dropped, [offset, offset + run.documents])
        inside[dropped[first:last] - offset] = False
        rows = np.flatnonzero(inside)
        numbers.append(rows + offset)
        hashes.append(own[rows])
    return np.concatenate(numbers), np.concatenate(hashes)


def _shared(members: Ints, changes: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """The members of groups of at least two, and the number of each one's group.

    ``changes`` [members - 1]: whether a group ends between two neighbours.
    """
    if len(members) == 0:
        return members, members
    groups = np.concatenate([[0], np.cumsum(changes)])
    several = (np.bincount(groups) > 1)[groups]
    return members[several], groups[several]


def _firsts(groups: Ints) -> Ints:
    """[groups] for each place the first place of its group; ``groups`` stand together."""
    begins = np.concatenate([[True] * (len(groups) > 0), groups[1:] != groups[:-1]]).astype(bool)
    firsts: Ints = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    return firsts


def _alike(corpus: Corpus, left: Ints, right: Ints, threshold: float) -> npt.NDArray[np.bool_]:
    """[pairs] whether the signatures of ``left`` and ``right`` agree in at least ``threshold`` of their positions."""
    alike = np.zeros(len(left), bool)
    for begin in range(0, len(left), _COMPARED_AT_ONCE):
        part = slice(begin, begin + _COMPARED_AT_ONCE)
        unique, places = np.unique(np.concatenate([left[part], right[part]]), return_inverse=True)
        signatures = corpus.signatures(unique)
        half = len(left[part])
        alike[part] = agreement(signatures[places[:half]], signatures[places[half:]]) >= threshold
    return alike


def _pairs(documents: Ints, kept: Ints) -> npt.NDArray[np.void]:
    pairs = np.zeros(len(documents), PAIR_DTYPE)
    pairs["document"], pairs["kept"] = documents, kept
    return pairs
