"""The side files of what was left out: ``rejected/NNNNNN.parquet``, rows of :data:`REJECTED_SCHEMA`.

First come the records that the first pass rejected, source by source in input order, then the duplicates, source by
source in the order of their shuffle keys. Files are cut by numbers of rows and ranges of keys, so that they hang on the
settings and the content alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..cleaning import Rejection
from ..files import publish_bytes
from ..layout import rejected_path
from ..tokenizer import Tokenizer
from .checked_files import check_pieces, opened, publish_record, publish_whole, read_piece, read_whole
from .compare import stage_and_reason
from .duplicates import Corpus, RunFiles
from .runs import read_drops
from .workspace import Workspace

ROWS_PER_FILE = 100_000

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("stage", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("source", pa.string()),
        pa.field("url", pa.string()),
        pa.field("id", pa.string()),
        pa.field("text_bytes", pa.uint64()),
        pa.field("text", pa.string()),
    ]
)
"""One row a rejected record: the stage (a key of ``cleaning``; ``source`` for records that were no documents), the rule
that counts it, what was measured, its source and place, the hex hash and the size of its text ("" and 0 for what was no
document), and the beginning of the text."""

Rejects = list[dict[str, Any]]


@dataclass(frozen=True)
class RejectedJob:
    """One side file to write; everything a worker process needs.

    Attributes:
        pieces: (file of a part, first row, last row): what to take from the first pass.
        runs: all runs; those of ``source`` give their dropped rows with keys in range ``index`` of ``count``.
    """

    folder: Path
    name: str
    source: str
    pieces: tuple[tuple[str, int, int], ...] = ()
    runs: tuple[RunFiles, ...] = ()
    source_number: int = -1
    index: int = 0
    count: int = 1
    characters: int = 0

    @property
    def record(self) -> Path:
        """Published when the file is."""
        return Workspace(self.folder).shard_records / f"rejected-{self.name}.json"

    @property
    def tokens(self) -> int:
        """None: they go to no shard."""
        return 0

    @property
    def label(self) -> str:
        """For messages."""
        return f"rejected {self.name}"


def rejected_row(
    rejection: Rejection, source: str, identity: bytes, text_bytes: int, characters: int
) -> dict[str, Any]:
    """A row of :data:`REJECTED_SCHEMA` with ``characters`` of the text."""
    return {
        "stage": rejection.stage,
        "reason": rejection.reason,
        "detail": rejection.detail,
        "source": source,
        "url": rejection.url,
        "id": identity.hex(),
        "text_bytes": text_bytes,
        "text": rejection.text[:characters],
    }


def write_rejects(path: Path, rows: Rejects) -> None:
    """Publish rows (dictionaries after :data:`REJECTED_SCHEMA`) for the last pass to take."""
    publish_whole(path, _parquet(rows))


def plan_rejected(
    folder: Path,
    records: Sequence[dict[str, Any]],
    parts: Sequence[Path],
    runs: Sequence[RunFiles],
    sources: Sequence[str],
    dropped: dict[str, dict[str, Any]],
    characters: int,
) -> list[RejectedJob]:
    """The side files to write.

    Args:
        records: what the first pass recorded of each part: ``source`` and ``rejected_rows``.
        parts: the file of each part's rejected rows.
        runs: all runs, in order of their parts.
        dropped: :func:`.compare.dropped_totals`, or nothing if duplicates stay.
        characters: of each text to keep.
    """
    jobs: list[RejectedJob] = []
    for source in sources:
        own = [(str(path), r["rejected_rows"]) for path, r in zip(parts, records, strict=True) if r["source"] == source]
        ends = np.cumsum([rows for _, rows in own])
        for first in range(0, int(ends[-1]) if len(own) else 0, ROWS_PER_FILE):
            last = min(first + ROWS_PER_FILE, int(ends[-1]))
            pieces = []
            for (path, rows), end in zip(own, ends.tolist(), strict=True):
                begin = end - rows
                if max(begin, first) < min(end, last):
                    pieces.append((path, max(begin, first) - begin, min(end, last) - begin))
            jobs.append(RejectedJob(folder, f"{len(jobs):06d}", source, tuple(pieces)))
    for number, source in enumerate(sources):
        count = -(-dropped.get(source, {"documents": 0})["documents"] // ROWS_PER_FILE)
        for index in range(count):
            name = f"{len(jobs):06d}"
            jobs.append(RejectedJob(folder, name, source, (), tuple(runs), number, index, count, characters))
    return jobs


def gather_rejected(job: RejectedJob) -> None:
    """Write one side file, then its record: its row of the manifest."""
    path = rejected_path(job.folder, job.name)
    path.parent.mkdir(exist_ok=True)
    rows = _taken(job) if job.pieces else _duplicates(job)
    content = _parquet(rows)
    publish_bytes(path, content)
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    publish_record(job.record, {"name": job.name, "rows": len(rows), **about})


def _taken(job: RejectedJob) -> Rejects:
    rows: Rejects = []
    for path, first, last in job.pieces:
        rows += pq.read_table(io.BytesIO(read_whole(Path(path)))).slice(first, last - first).to_pylist()
    return rows


def _parquet(rows: Rejects) -> bytes:
    """Equal rows give equal bytes."""
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, REJECTED_SCHEMA), content, compression="zstd")
    return content.getvalue()


def _duplicates(job: RejectedJob) -> Rejects:
    corpus = Corpus(job.runs)
    tokenizer = Tokenizer.load(Workspace(job.folder).tokenizer)
    found: list[tuple[Any, ...]] = []
    for offset, run in zip(corpus.offsets.tolist(), job.runs, strict=False):
        if run.source == job.source_number:
            found += [(offset + row, *about) for row, *about in _dropped_texts(run, job, tokenizer)]
    numbers = np.array([row[0] for row in found], np.int64)
    kept = np.array([row[2] for row in found], np.int64)
    urls, kept_urls = corpus.texts(numbers, "url"), corpus.texts(kept, "url")
    ids, kept_ids, heldout = corpus.ids(numbers), corpus.ids(kept), corpus.heldout(kept).tolist()
    rows: Rejects = []
    for place in corpus.by_priority(numbers, np.zeros(len(numbers), np.int64)).tolist():
        _, code, _, size, text = found[place]
        stage, reason = stage_and_reason(code, heldout[place])
        detail = f"{kept_ids[place].hex()} {kept_urls[place].decode()}"
        rejection = Rejection(stage, reason, detail, urls[place].decode(), text)
        rows.append(rejected_row(rejection, job.source, ids[place], size, job.characters))
    return rows


def _dropped_texts(run: RunFiles, job: RejectedJob, tokenizer: Tokenizer) -> Iterator[tuple[int, int, int, int, str]]:
    """Row, stage, number of the kept document, bytes and the text's beginning of what the run drops in the job's range
    of keys."""
    table, drops = run.table(), read_drops(run.path)
    path, dtype = f"{run.path}.tokens", np.dtype(tokenizer.dtype)
    with opened(path) as handle:
        for first, last in run.key_range(job.index, job.count):
            begin = drops.place("row", first, 0, len(drops))
            for row, stage, kept in drops.rows(begin, drops.place("row", last, begin, len(drops))).tolist():
                document = table.rows(row, row + 1)[0]
                text = ""
                if job.characters:
                    start, length = int(document["start"]), int(document["length"])
                    piece = read_piece(handle, start * dtype.itemsize, length * dtype.itemsize)
                    check_pieces(path, [piece], document["tokens_crc32c"][None])
                    text = tokenizer.decode(np.frombuffer(piece, dtype)[:-1])
                yield row, stage, kept, int(document["text_bytes"]), text[: job.characters]  # all rows are held at once
