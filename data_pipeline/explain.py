"""``pretrain-data explain``: which documents a step of a run has read, rank by rank and row by row."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .damage import Reason, holes_of_run
from .errors import DataError, UserError
from .history import Stretch, read_history
from .layout import SHARD_FOLDER, TOKENIZER_FILE
from .manifest import Shard
from .order import Order
from .reader import TokenSource
from .shard_reading import TABLE_ADVICE, DamagedTableError, documents_of
from .storage import MissingFileError, StorageSettings, open_store
from .stream import open_stream
from .tokenizer import Tokenizer

_TABLES_TOLD = 3
"""Damaged document tables that an error tells of one by one."""


@dataclass(frozen=True)
class DocumentPart:
    """The part of a document that lies in a sequence: tokens ``first`` to ``first + tokens`` of the sequence are those
    from ``skipped`` on of the document; ``text`` is theirs, where it was asked for."""

    id: str
    url: str
    domain: str
    metadata: str
    first: int
    tokens: int
    skipped: int
    text: str | None = None


@dataclass(frozen=True)
class ExplainedRow:
    """One sequence of a step: who read it, and where it comes from. ``offset``: bytes from the start of the shard.
    ``hole``: what was wrong there where the run had a hole in its place, so that it has read no document."""

    step: int
    rank: int
    row: int
    position: int
    source: str
    epoch: int
    sequence: int
    shard: str
    block: int
    offset: int
    documents: tuple[DocumentPart, ...]
    hole: Reason | None = None


def explain(run: Path, step: int, rank: int | None, row: int | None, with_text: bool) -> Iterator[ExplainedRow]:
    """The rows of step ``step`` (as metrics.jsonl names it: 1 is the first) of a run.

    Args:
        run: the run folder.
        step: the step.
        rank: only this rank's rows; ``None``: all.
        row: only this row of each rank, counted over its micro-batches; ``None``: all.
        with_text: decode the tokens of each document.

    Raises:
        UserError: no such run, step, rank or row, or a data set is gone or is another one now.
        DataError: a data set is damaged there; after the rows whose documents are known where tables of documents are.
    """
    stretch = read_history(run).of_step(step - 1)
    positions = stretch.positions(step - 1)
    rows = len(positions) // stretch.world_size
    for what, value, count in (("rank", rank, stretch.world_size), ("row", row, rows)):
        if value is not None and not 0 <= value < count:
            raise UserError(f"step {step} of {run} ran with {what}s 0 to {count - 1}; there is no {what} {value}.")
    lost: Counter[str] = Counter()
    with open_reading(stretch, holes_of_run(run)) as reading:
        for position in positions.tolist():
            seat = stretch.seat(step - 1, position)
            if rank in (None, seat[0]) and row in (None, seat[1]):
                try:
                    found = reading.row(step, seat, position, with_text)
                except DamagedTableError as error:
                    lost[error.problem] += 1
                    continue
                yield found
    if lost:
        told = "; ".join(list(lost)[:_TABLES_TOLD])
        more = f" and {len(lost) - _TABLES_TOLD} more" if len(lost) > _TABLES_TOLD else ""
        which = f"{lost.total()} row{'s' if lost.total() > 1 else ''} of step {step}"
        raise DataError(f"the documents of {which} are not known: {told}{more}. {TABLE_ADVICE}")


def describe(row: ExplainedRow) -> str:
    """A row for people."""
    lines = [
        f"step {row.step}, rank {row.rank}, row {row.row}: position {row.position:,} = source {row.source!r}, epoch "
        f"{row.epoch}, sequence {row.sequence:,}; shard {row.shard}, block {row.block}, byte {row.offset:,}"
    ]
    if row.hole:
        lines.append(f"  a hole ({row.hole}): nothing was read")
    for part in row.documents:
        skipped = f", from its token {part.skipped:,} on" if part.skipped else ""
        lines.append(f"  tokens {part.first} to {part.first + part.tokens}: {part.id} {part.url}{skipped}")
        lines += [f"    | {line}" for line in (part.text or "").splitlines()]
    return "\n".join(lines)


class Reading:
    """The opened data of a stretch of a run; ``holes``: the run's, by position."""

    def __init__(
        self,
        stretch: Stretch,
        names: tuple[str, ...],
        sources: tuple[TokenSource, ...],
        order: Order,
        holes: Mapping[int, Reason] | None = None,
    ) -> None:
        self.stretch, self.names, self.sources, self.order = stretch, names, sources, order
        self.holes: Mapping[int, Reason] = holes or {}
        self._damaged: dict[tuple[str, str], DamagedTableError] = {}

    def row(self, step: int, seat: tuple[int, int], position: int, with_text: bool) -> ExplainedRow:
        located = self.order.locate(position, 1)
        number, sequence = int(located.source[0]), int(located.sequence[0])
        source, name = self.sources[number], self.names[number]
        place, layout = source.place(sequence), source.manifest.layout
        within = place.token - place.block * layout.block_tokens
        hole = self.holes.get(position)
        parts: tuple[DocumentPart, ...] = ()
        if hole is None:
            shard = source.shards[bisect.bisect_left(source.shards.names, place.shard)]
            parts = _parts(self.documents(name, shard), place.token, source.seq_len)
        if with_text and parts:
            decode, tokens = self._tokenizer(name).decode, source.read([sequence])[0].tolist()
            parts = tuple(replace(part, text=decode(tokens[part.first : part.first + part.tokens])) for part in parts)
        return ExplainedRow(
            step=step,
            rank=seat[0],
            row=seat[1],
            position=position,
            source=name,
            epoch=int(located.epoch[0]),
            sequence=sequence,
            shard=place.shard,
            block=place.block,
            offset=layout.data_offset(place.block) + within * layout.token_bytes,
            documents=parts,
            hole=hole,
        )

    def documents(self, name: str, shard: Shard) -> Any:
        """The document table of a shard of the source ``name``.

        Raises:
            DamagedTableError: as in :func:`read_table`; it is read once, however often it is asked for.
        """
        if known := self._damaged.get((name, shard.name)):
            raise known
        try:
            return read_table(self.stretch.stream.sources[name].path, shard, self.stretch.stream)
        except DamagedTableError as error:
            self._damaged[name, shard.name] = error
            raise

    def _tokenizer(self, name: str) -> Tokenizer:
        root = self.stretch.stream.sources[name].path
        return Tokenizer(open_store(root, self.stretch.stream).read(TOKENIZER_FILE), f"{root}/{TOKENIZER_FILE}")

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *error: object) -> None:
        for source in self.sources:
            source.close()


def open_reading(stretch: Stretch, holes: Mapping[int, Reason]) -> Reading:
    """Open the data that a stretch of a run with these ``holes`` has read.

    Raises:
        UserError: a data set is gone, or is not the one that was read.
    """
    stream = open_stream(stretch.stream, stretch.seed, (0, stretch.world_size))
    for name, source in zip(stream.names, stream.sources, strict=True):
        if source.manifest.identity != stretch.data_sets[name]:
            raise UserError(
                f"the data set {stretch.stream.sources[name].path} of source {name!r} is not the one that the run has "
                f"read: its identity is {source.manifest.identity[:12]} and was {stretch.data_sets[name][:12]}. "
                "Put that one back."
            )
    return Reading(stretch, stream.names, stream.sources, stream.order, holes)


@lru_cache(maxsize=16)
def _table(root: str, shard: str, sha256: str, settings: str) -> Any:
    store = open_store(root, StorageSettings.model_validate_json(settings))
    name = f"{SHARD_FOLDER}/{shard}.docs.parquet"
    try:
        content = store.read(name)
    except MissingFileError as error:
        raise DamagedTableError(f"the document table {store.root}/{name} is missing") from error
    return documents_of(content, f"{store.root}/{name}", sha256)


def read_table(root: str, shard: Shard, settings: StorageSettings) -> Any:
    """The document table of a shard of a data set that may be remote (a pyarrow Table; the last few are kept).

    Raises:
        DamagedTableError: it is missing or not the one that was written. DataError: it can't be read.
    """
    plain = StorageSettings(**{name: getattr(settings, name) for name in StorageSettings.model_fields})
    return _table(root, shard.name, shard.docs_sha256, plain.model_dump_json())


def _parts(table: Any, first: int, length: int) -> tuple[DocumentPart, ...]:
    """The documents that lie in tokens ``first`` to ``first + length`` of a shard."""
    starts = table["start"].to_numpy().astype(np.int64)
    ends = starts + table["length"].to_numpy().astype(np.int64)
    by_start = np.argsort(starts, kind="stable")
    inside = by_start[(starts[by_start] < first + length) & (ends[by_start] > first)]
    rows = table.take(pa.array(inside)).to_pylist()
    parts = []
    for row, begin, end in zip(rows, starts[inside].tolist(), ends[inside].tolist(), strict=True):
        low, high = max(begin, first), min(end, first + length)
        parts.append(
            DocumentPart(
                id=row["id"],
                url=row["url"],
                domain=row["domain"],
                metadata=row["metadata"],
                first=low - first,
                tokens=high - low,
                skipped=low - begin,
            )
        )
    return tuple(parts)
