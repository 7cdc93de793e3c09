"""Runs: documents of one part, tokenised and sorted by shuffle key, in files that are read in pieces.

A run ``NAME`` is four files: ``NAME.docs``, a table of :data:`RUN_DTYPE`; ``NAME.tokens``, the documents' tokens in
that order, each with its EOS; ``NAME.urls`` and ``NAME.metadata``, their text end to end. The training documents come
first, then the held-out ones, each sorted by key, content hash, url and metadata. So the documents of a range of keys
are neighbours in every file. The table holds the CRC32Cs of the other three, and has its own (:mod:`.checked_files`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import publish
from ..manifest import HELDOUT, TRAIN
from .checked_files import CheckedRows, check_pieces, opened, piece_sums, publish_rows, read_piece

ID_BYTES = 16

RUN_DTYPE = np.dtype(
    [
        ("key", "<u8"),
        ("id", "u1", (ID_BYTES,)),
        ("start", "<u8"),
        ("length", "<u8"),
        ("text_bytes", "<u8"),
        ("url_start", "<u8"),
        ("url_bytes", "<u8"),
        ("metadata_start", "<u8"),
        ("metadata_bytes", "<u8"),
        ("tokens_crc32c", "<u4"),
        ("url_crc32c", "<u4"),
        ("metadata_crc32c", "<u4"),
    ]
)

DROP_DTYPE = np.dtype([("row", "<u8"), ("stage", "u1"), ("kept", "<i8")])
"""A row of one run to leave out, the stage that found it (:mod:`.duplicates`), and the number of the document that it
repeats."""

_DOCUMENTS_AT_ONCE = 256

IntArray = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Documents:
    """Tokenised documents in memory, in any order.

    Attributes:
        keys: [n] uint64 shuffle keys.
        ids: [n, 16] uint8 content hashes.
        lengths: [n] tokens of each, its EOS included.
        text_bytes: [n] UTF-8 bytes of each text.
        urls: where each came from, UTF-8.
        metadata: what else is known of each: a JSON object, or empty.
        signatures: [n, permutations] uint32 MinHash signatures; no columns if near duplicates stay.
        tokens: [sum of lengths] the documents end to end.
    """

    keys: npt.NDArray[np.uint64]
    ids: npt.NDArray[np.uint8]
    lengths: IntArray
    text_bytes: IntArray
    urls: list[bytes]
    metadata: list[bytes]
    tokens: Tokens
    signatures: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.urls)

    @classmethod
    def joined(cls, pieces: Sequence[Documents]) -> Documents:
        """The documents of all ``pieces`` (at least one), one after another."""
        if len(pieces) == 1:
            return pieces[0]
        return cls(
            keys=np.concatenate([piece.keys for piece in pieces]),
            ids=np.concatenate([piece.ids for piece in pieces]),
            lengths=np.concatenate([piece.lengths for piece in pieces]),
            text_bytes=np.concatenate([piece.text_bytes for piece in pieces]),
            urls=[url for piece in pieces for url in piece.urls],
            metadata=[value for piece in pieces for value in piece.metadata],
            tokens=np.concatenate([piece.tokens for piece in pieces]),
            signatures=np.concatenate([piece.signatures for piece in pieces]),
        )

    def each_tokens(self) -> list[Tokens]:
        """The tokens of each document: views."""
        ends = np.cumsum(self.lengths)
        begins = ends - self.lengths
        return [self.tokens[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]

    def only(self, kept: npt.NDArray[np.bool_]) -> Documents:
        """The documents that ``kept`` [n] names."""
        numbers = np.flatnonzero(kept).tolist()
        return Documents(
            keys=self.keys[kept],
            ids=self.ids[kept],
            lengths=self.lengths[kept],
            text_bytes=self.text_bytes[kept],
            urls=[self.urls[number] for number in numbers],
            metadata=[self.metadata[number] for number in numbers],
            tokens=self.tokens[np.repeat(kept, self.lengths)],
            signatures=self.signatures[kept],
        )

    def shuffled(self, chosen: IntArray) -> IntArray:
        """The numbers ``chosen`` in shuffle order: by key, content hash, url, metadata."""
        order: IntArray = chosen[np.argsort(self.keys[chosen], kind="stable")]
        keys = self.keys[order]
        equal = np.flatnonzero(keys[1:] == keys[:-1])
        for first, last in _stretches(equal.tolist()):
            order[first:last] = sorted(order[first:last].tolist(), key=self._tie)
        return order

    def _tie(self, number: int) -> tuple[bytes, bytes, bytes]:
        return self.ids[number].tobytes(), self.urls[number], self.metadata[number]


def write_run(path: Path, documents: Documents, order: IntArray) -> None:
    """Publish the files of the run ``path`` (without suffix): ``documents`` in ``order``."""
    table = np.zeros(len(order), RUN_DTYPE)
    table["key"], table["id"] = documents.keys[order], documents.ids[order]
    table["length"], table["text_bytes"] = documents.lengths[order], documents.text_bytes[order]
    table["start"] = np.cumsum(table["length"]) - table["length"]
    for name in ("url", "metadata"):
        texts = documents.urls if name == "url" else documents.metadata
        ordered = [texts[number] for number in order.tolist()]
        table[f"{name}_bytes"] = [len(text) for text in ordered]
        table[f"{name}_start"] = np.cumsum(table[f"{name}_bytes"]) - table[f"{name}_bytes"]
        table[f"{name}_crc32c"] = piece_sums(ordered)
        with publish(_beside(path, "urls" if name == "url" else name)) as handle:
            handle.write(b"".join(ordered))
    stored = documents.tokens.dtype.newbyteorder("<")
    tokens = documents.each_tokens()
    ordered_tokens = [tokens[number].astype(stored, copy=False) for number in order.tolist()]
    table["tokens_crc32c"] = piece_sums(ids.data for ids in ordered_tokens)
    with publish(_beside(path, "tokens")) as handle:
        for first in range(0, len(ordered_tokens), _DOCUMENTS_AT_ONCE):
            handle.write(np.concatenate(ordered_tokens[first : first + _DOCUMENTS_AT_ONCE], dtype=stored).data)
    publish_rows(_beside(path, "docs"), table)


@dataclass(frozen=True)
class Run:
    """The documents of one split in one run: rows ``first`` to ``last`` of its table. Opens files when asked.

    ``deduplicated``: the run has a drop list, and what stands there is left out.

    Every method raises :class:`DamagedFileError` for what is not as it was written, of what it reads.
    """

    path: str
    first: int
    last: int
    deduplicated: bool

    @classmethod
    def of(cls, folder: Path, run: dict[str, Any], split: str, deduplicated: bool) -> Run:
        """The rows of ``split`` in a run as a part's record describes it."""
        train, heldout = run[TRAIN]["documents"], run[HELDOUT]["documents"]
        first, last = (0, train) if split == TRAIN else (train, train + heldout)
        return cls(str(folder / run["name"]), first, last, deduplicated)

    def table(self) -> CheckedRows:
        """The run's whole table, rows of other splits included; each split is sorted by key."""
        return CheckedRows(f"{self.path}.docs", RUN_DTYPE)

    def read(self, low: int, high: int, dtype: np.dtype[np.unsignedinteger]) -> Documents | None:
        """The documents with keys in [low, high), or ``None``; costs what they hold, not what the run holds."""
        table = self.table()
        first = table.place("key", low, self.first, self.last)
        last = table.place("key", high, first, self.last)
        if first == last:
            return None
        rows = np.array(table.rows(first, last))
        begin, end = int(rows["start"][0]), int(rows["start"][-1] + rows["length"][-1])
        tokens = np.frombuffer(_read_range(f"{self.path}.tokens", begin * dtype.itemsize, end * dtype.itemsize), dtype)
        documents = Documents(
            keys=rows["key"],
            ids=rows["id"],
            lengths=rows["length"].astype(np.int64),
            text_bytes=rows["text_bytes"].astype(np.int64),
            urls=_texts(f"{self.path}.urls", rows, "url"),
            metadata=_texts(f"{self.path}.metadata", rows, "metadata"),
            tokens=tokens,
            signatures=np.zeros((len(rows), 0), np.uint32),
        )
        check_pieces(f"{self.path}.tokens", [ids.data for ids in documents.each_tokens()], rows["tokens_crc32c"])
        if not self.deduplicated:
            return documents
        kept = self._kept(first, last)
        return documents.only(kept) if kept.any() else None

    def tokens_per_range(self, cuts: npt.NDArray[np.uint64]) -> IntArray:
        """[cuts + 1] the tokens of the documents before, between and after the keys ``cuts``, which ascend."""
        rows = self.table().rows(self.first, self.last)
        lengths = rows["length"].astype(np.int64)
        if self.deduplicated:
            lengths *= self._kept(self.first, self.last)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        places = np.searchsorted(np.ascontiguousarray(rows["key"]), cuts, side="left")
        tokens: IntArray = np.diff(ends[np.concatenate([[0], places, [len(rows)]])])
        return tokens

    def _kept(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """[last - first] whether each of these rows of :meth:`table` stays."""
        kept = np.ones(last - first, bool)
        drops = read_drops(self.path)
        begin = drops.place("row", first, 0, len(drops))
        own = drops.rows(begin, drops.place("row", last, begin, len(drops)))
        kept[own["row"].astype(np.int64) - first] = False
        return kept


def read_drops(run_path: str) -> CheckedRows:
    """:data:`DROP_DTYPE`: the rows of one run to leave out, ascending.

    Raises:
        DamagedFileError: the list is missing, or not as it was written.
    """
    return CheckedRows(f"{run_path}.drop", DROP_DTYPE)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _stretches(equal: list[int]) -> list[tuple[int, int]]:
    """(first, last) of every stretch of equal neighbours; ``equal``: places that equal the next one."""
    found: list[tuple[int, int]] = []
    for place in equal:
        if found and found[-1][1] == place + 1:
            found[-1] = (found[-1][0], place + 2)
        else:
            found.append((place, place + 2))
    return found


def _read_range(path: str, start: int, stop: int) -> bytes:
    with opened(path) as handle:
        return read_piece(handle, start, stop - start)


def _texts(path: str, rows: npt.NDArray[np.void], column: str) -> list[bytes]:
    """The texts of neighbouring ``rows`` of a run's table."""
    starts, sizes = rows[f"{column}_start"], rows[f"{column}_bytes"]
    base, end = int(starts[0]), int(starts[-1] + sizes[-1])
    if base == end:
        return [b""] * len(starts)
    blob = _read_range(path, base, end)
    begins = (starts - starts[0]).tolist()
    texts = [blob[begin : begin + size] for begin, size in zip(begins, sizes.tolist(), strict=True)]
    check_pieces(path, texts, rows[f"{column}_crc32c"])
    return texts
