"""``pretrain-data when-seen``: the steps in which a run reads a document: the inverse of the order, not a search."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from .arrow import parquet_table
from .damage import Reason, holes_of_run
from .errors import UserError
from .explain import Reading, open_reading
from .history import read_history
from .layout import REJECTED_FOLDER
from .manifest import HELDOUT, RejectedFile, ShardTable
from .order import Order
from .permutation import LARGEST
from .prepare.parts import shuffle_key
from .storage import StorageSettings, open_store

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Seen:
    """One reading of a part of a document. ``first``: the token of the document with which the part begins; ``hole``:
    what was wrong there where the run had a hole in its place, so that it has not read it."""

    id: str
    url: str
    source: str
    epoch: int
    first: int
    tokens: int
    position: int
    step: int
    rank: int
    row: int
    hole: Reason | None = None


def describe(seen: Seen) -> str:
    """A reading for people."""
    hole = f": a hole ({seen.hole}): nothing was read" if seen.hole else ""
    return (
        f"step {seen.step}, rank {seen.rank}, row {seen.row}: position {seen.position:,}, source {seen.source!r}, "
        f"epoch {seen.epoch}, tokens {seen.first:,} to {seen.first + seen.tokens:,} of {seen.id} {seen.url}{hole}"
    )


@dataclass(frozen=True)
class _Found:
    """A document in a source: its first sequence, and where it lies in the shard."""

    source: int
    id: str
    url: str
    shard: int
    start: int
    length: int


def when_seen(run: Path, document: str) -> list[Seen]:
    """Every reading of a document up to the end of the run, in the order of the steps; holes among them, marked.

    Args:
        run: the run folder.
        document: its 32-digit content hash (found in one table), or its url (all tables are searched).

    Raises:
        UserError: no such run, or none of its sources holds the document in its training split; says so when the
            document is held out, or was left out when the data set was prepared, and why.
        DataError: a table of documents that has to be searched is missing or damaged.
    """
    seen: list[Seen] = []
    known = False
    spans, holes = read_history(run).spans(), holes_of_run(run)
    for stretch, end_step in spans:
        with open_reading(stretch, holes) as reading:
            for found in _find(reading, document):
                known = True
                seen += _readings(reading, found, end_step)
    if not known:
        with open_reading(spans[-1][0], holes) as reading:
            raise _absence(reading, run, document)
    return sorted(seen, key=lambda each: (each.step, each.position))


def _find(reading: Reading, document: str) -> Iterator[_Found]:
    for number, (name, source) in enumerate(zip(reading.names, reading.sources, strict=True)):
        for shard, row in _search(reading, name, source.shards, document):
            yield _Found(number, row["id"], row["url"], shard, row["start"], row["length"])


def _search(reading: Reading, name: str, shards: ShardTable, document: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a document in the tables of ``shards``, each with the number of its shard."""
    by_id = _ID.fullmatch(document) is not None
    seed = reading.sources[reading.names.index(name)].manifest.settings.get("seed", 0)
    places = _candidates(shards, seed, document) if by_id else range(len(shards))
    for place in tqdm(places, desc=f"search {name}", unit="shard", disable=len(places) < 100):
        table = reading.documents(name, shards[place])
        for row in table.filter(pc.equal(table["id" if by_id else "url"], document)).to_pylist():
            yield place, row


def _candidates(shards: ShardTable, seed: int, document: str) -> list[int]:
    """The shards that can hold a document: one of each domain, for `prepare` writes a domain's in key order."""
    key = shuffle_key(bytes.fromhex(document), seed)
    chosen: list[int] = []
    for domain in range(len(shards.domains)):
        of_domain = np.flatnonzero(shards.domain_codes == domain)
        keys = shards.first_key[of_domain]
        place = int(np.searchsorted(keys, np.uint64(key), side="right")) - 1
        if (keys[1:] <= keys[:-1]).any():
            chosen += of_domain.tolist()  # not written by `prepare`: in no order of keys
        elif place >= 0:
            chosen.append(int(of_domain[place]))
    return chosen


def _readings(reading: Reading, found: _Found, end_step: int) -> Iterator[Seen]:
    """The readings of one document between the first step of a stretch and ``end_step``."""
    stretch, order, source = reading.stretch, reading.order, reading.sources[found.source]
    length = source.seq_len
    base = int((-(-source.shards.tokens[: found.shard] // length)).sum())
    end = stretch.start_of(end_step)
    for number in range(found.start // length, -(-(found.start + found.length) // length)):
        first = max(found.start, number * length)
        last = min(found.start + found.length, (number + 1) * length)
        epoch = _first_epoch(order, found.source, base + number, stretch.first_position)
        while 0 <= (position := int(order.position_of(found.source, [base + number], epoch)[0])) < end:
            step = stretch.step_of(position, end_step)
            if step is not None:
                rank, row = stretch.seat(step, position)
                yield Seen(
                    id=found.id,
                    url=found.url,
                    source=reading.names[found.source],
                    epoch=epoch,
                    first=first - found.start,
                    tokens=last - first,
                    position=position,
                    step=step + 1,
                    rank=rank,
                    row=row,
                    hole=reading.holes.get(position),
                )
            epoch += 1


def _first_epoch(order: Order, source: int, sequence: int, position: int) -> int:
    """The first epoch in which a sequence comes at ``position`` or later; or one in which it never comes."""

    def place(epoch: int) -> int:
        found = int(order.position_of(source, [sequence], epoch)[0])
        return LARGEST if found < 0 else found

    drawn = int(order.needed(position)[source]) // order.sources[source].sequences
    # strata, each with draws of its own, may be ahead of the whole source or behind it
    return bisect.bisect_left(range(2 * drawn + 2), position, key=place)


def _left_out(storage: StorageSettings, root: str, rejected: Sequence[RejectedFile], document: str) -> str | None:
    """Why `prepare` left a document out of the data set at ``root``, and where that stands; ``None``: it did not."""
    key = "id" if _ID.fullmatch(document) else "url"
    store = open_store(root, storage)
    for file in tqdm(rejected, desc="search what was left out", unit="file", disable=len(rejected) < 20):
        path = f"{REJECTED_FOLDER}/{file.name}.parquet"
        table = parquet_table(store.read(path))
        for row in table.filter(pc.equal(table[key], document)).slice(0, 1).to_pylist():
            return f"by {row['stage']}: {row['reason']} ({row['detail']}). {store.root}/{path} lists it."
    return None


def _absence(reading: Reading, run: Path, document: str) -> UserError:
    """Why no training split holds a document."""
    for name, source in zip(reading.names, reading.sources, strict=True):
        try:
            heldout = source.manifest.select(source.domain, HELDOUT)
        except UserError:  # the data set has no held-out split
            continue
        if next(_search(reading, name, heldout, document), None):
            return UserError(f"document {document} is held out in source {name!r}: {run} never trains on it.")
    for source in reading.sources:
        if left_out := _left_out(reading.stretch.stream, source.root, source.manifest.rejected, document):
            return UserError(
                f"document {document} is in no source of {run}: it was left out when the data set was prepared, "
                f"{left_out}"
            )
    return UserError(
        f"no source of {run} holds the document {document!r}. Give its 32-digit id or its url, as "
        "`pretrain-data inspect --samples` and the shards' .docs.parquet show them."
    )
