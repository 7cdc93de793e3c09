"""``pretrain-data explain``: which documents a step of a run has read, rank by rank and row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .arrow import parquet_table
from .errors import DataError, UserError
from .history import Stretch, read_history
from .layout import SHARD_FOLDER, TOKENIZER_FILE
from .order import Order
from .reader import TokenSource
from .storage import StorageSettings, open_store
from .stream import open_stream
from .tokenizer import Tokenizer


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
    """One sequence of a step: who read it, and where it comes from. ``offset``: bytes from the start of the shard."""

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
        DataError: a data set is damaged there.
    """
    stretch = read_history(run).of_step(step - 1)
    positions = stretch.positions(step - 1)
    rows = len(positions) // stretch.world_size
    for what, value, count in (("rank", rank, stretch.world_size), ("row", row, rows)):
        if value is not None and not 0 <= value < count:
            raise UserError(f"step {step} of {run} ran with {what}s 0 to {count - 1}; there is no {what} {value}.")
    with open_reading(stretch) as reading:
        for position in positions.tolist():
            seat = stretch.seat(step - 1, position)
            if rank in (None, seat[0]) and row in (None, seat[1]):
                yield reading.row(step, seat, position, with_text)


def describe(row: ExplainedRow) -> str:
    """A row for people."""
    lines = [
        f"step {row.step}, rank {row.rank}, row {row.row}: position {row.position:,} = source {row.source!r}, epoch "
        f"{row.epoch}, sequence {row.sequence:,}; shard {row.shard}, block {row.block}, byte {row.offset:,}"
    ]
    for part in row.documents:
        skipped = f", from its token {part.skipped:,} on" if part.skipped else ""
        lines.append(f"  tokens {part.first} to {part.first + part.tokens}: {part.id} {part.url}{skipped}")
        lines += [f"    | {line}" for line in (part.text or "").splitlines()]
    return "\n".join(lines)


class Reading:
    """The opened data of a stretch of a run."""

    def __init__(self, stretch: Stretch, names: tuple[str, ...], sources: tuple[TokenSource, ...], order: Order):
        self.stretch, self.names, self.sources, self.order = stretch, names, sources, order

    def row(self, step: int, seat: tuple[int, int], position: int, with_text: bool) -> ExplainedRow:
        located = self.order.locate(position, 1)
        number, sequence = int(located.source[0]), int(located.sequence[0])
        source, name = self.sources[number], self.names[number]
        place, layout = source.place(sequence), source.manifest.layout
        within = place.token - place.block * layout.block_tokens
        parts = _parts(self.documents(name, place.shard), place.token, source.seq_len)
        if with_text:
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
        )

    def documents(self, name: str, shard: str) -> Any:
        """The document table of a shard of the source ``name``."""
        return read_table(self.stretch.stream.sources[name].path, shard, self.stretch.stream)

    def _tokenizer(self, name: str) -> Tokenizer:
        root = self.stretch.stream.sources[name].path
        return Tokenizer(open_store(root, self.stretch.stream).read(TOKENIZER_FILE), f"{root}/{TOKENIZER_FILE}")

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *error: object) -> None:
        for source in self.sources:
            source.close()


def open_reading(stretch: Stretch) -> Reading:
    """Open the data that a stretch has read.

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
    return Reading(stretch, stream.names, stream.sources, stream.order)


@lru_cache(maxsize=16)
def _table(root: str, shard: str, settings: str) -> Any:
    storage = StorageSettings.model_validate_json(settings)
    name = f"{SHARD_FOLDER}/{shard}.docs.parquet"
    try:
        return parquet_table(open_store(root, storage).read(name))
    except pa.ArrowException as error:
        raise DataError(f"the document table {root}/{name} can't be read: {error}. Restore it from a copy.") from error


def read_table(root: str, shard: str, settings: StorageSettings) -> Any:
    """The document table of a shard of a data set that may be remote (a pyarrow Table; the last few are kept).

    Raises:
        DataError: it is missing or is not parquet.
    """
    plain = StorageSettings(**{name: getattr(settings, name) for name in StorageSettings.model_fields})
    return _table(root, shard, plain.model_dump_json())


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
