"""Pass 2: shard k of S takes the documents whose keys lie in [k/S, (k+1)/S) from every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..files import publish_json
from ..layout import BlockLayout
from ..manifest import HELDOUT, SPLITS, TRAIN, Shard
from ..shards import ShardContent, write_shard
from .parts import RUN_DTYPE
from .workspace import Workspace


@dataclass(frozen=True)
class Run:
    """The documents of one split in one run: rows ``first`` to ``last`` of its table."""

    path: str
    first: int
    last: int

    def table(self) -> npt.NDArray[np.void]:
        """The rows, sorted by key; mapped, not read."""
        rows: npt.NDArray[np.void] = np.load(f"{self.path}.docs.npy", mmap_mode="r")[self.first : self.last]
        return rows


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; everything a worker process needs."""

    folder: Path
    name: str
    domain: str
    split: str
    index: int
    count: int
    tokens: int
    runs: tuple[Run, ...]
    layout: BlockLayout
    eos_id: int

    @property
    def record(self) -> Path:
        """Published when the shard's files are."""
        return Workspace(self.folder).shard_records / f"{self.name}.json"


def plan_shards(
    workspace: Workspace, records: Sequence[dict[str, Any]], layout: BlockLayout, shard_tokens: int, eos_id: int
) -> list[ShardJob]:
    """Cut every (split, domain) into ceil(tokens / shard_tokens) ranges of keys; a range without documents is no shard.

    Training shards come first, then held-out ones, domains in sorted order; shards are numbered in this order.

    Raises:
        UserError: over a million shards.
    """
    jobs: list[ShardJob] = []
    for split in SPLITS:
        for domain in sorted({record["domain"] for record in records}):
            runs = _runs(workspace, records, domain, split)
            total = sum(
                run[split]["tokens"] for record in records if record["domain"] == domain for run in record["runs"]
            )
            count = -(-total // shard_tokens)
            tokens = _tokens_per_range(runs, count)
            for index in np.flatnonzero(tokens).tolist():
                name = f"{len(jobs):06d}"
                jobs.append(
                    ShardJob(
                        workspace.folder, name, domain, split, index, count, int(tokens[index]), runs, layout, eos_id
                    )
                )
    if len(jobs) > 1_000_000:
        raise UserError(f"{len(jobs)} shards are too many (names have six digits). Raise shard_tokens.")
    return jobs


def gather_shard(job: ShardJob) -> Shard:
    """Write one shard and its record; a shard that has its record is not done again."""
    if job.record.exists():
        return Shard.model_validate(json.loads(job.record.read_bytes()))
    shard = write_shard(job.folder, job.name, job.domain, job.split, job.layout, job.eos_id, _content(job))
    publish_json(job.record, shard.model_dump(mode="json"))
    return shard


def _runs(workspace: Workspace, records: Sequence[dict[str, Any]], domain: str, split: str) -> tuple[Run, ...]:
    runs: list[Run] = []
    for record in records:
        for run in record["runs"] if record["domain"] == domain else []:
            train, heldout = run[TRAIN]["documents"], run[HELDOUT]["documents"]
            first, last = (0, train) if split == TRAIN else (train, train + heldout)
            if last > first:
                runs.append(Run(str(workspace.parts / run["name"]), first, last))
    return tuple(runs)


def _cuts(keys: npt.NDArray[np.uint64], first: int, last: int, count: int) -> npt.NDArray[np.int64]:
    """Where key ranges ``first`` to ``last`` of ``count`` begin in sorted ``keys``, the end of the last included."""
    inner = [(k << 64) // count for k in range(max(first, 1), min(last, count - 1) + 1)]
    cuts = np.searchsorted(keys, np.array(inner, np.uint64), side="left")
    head, tail = [0] * (first == 0), [len(keys)] * (last == count)
    return np.concatenate([head, cuts, tail]).astype(np.int64)


def _tokens_per_range(runs: Sequence[Run], count: int) -> npt.NDArray[np.int64]:
    tokens = np.zeros(count, np.int64)
    for run in runs:
        table = run.table()
        ends = np.concatenate([[0], np.cumsum(table["length"].astype(np.int64))])
        tokens += np.diff(ends[_cuts(np.ascontiguousarray(table["key"]), 0, count, count)])
    return tokens


def _content(job: ShardJob) -> ShardContent:
    tables: list[npt.NDArray[np.void]] = []
    streams: list[npt.NDArray[np.unsignedinteger]] = []
    urls: list[bytes] = []
    for run in job.runs:
        table = run.table()
        first, last = _cuts(np.ascontiguousarray(table["key"]), job.index, job.index + 1, job.count)
        if first == last:
            continue
        rows = np.array(table[first:last])
        tokens = np.memmap(f"{run.path}.tokens", job.layout.token_dtype, mode="r")
        streams += [
            tokens[start : start + length] for start, length in zip(*_pair(rows, "start", "length"), strict=True)
        ]
        with open(f"{run.path}.urls", "rb") as handle:
            handle.seek(int(rows["url_start"][0]))
            blob = handle.read(int(rows["url_start"][-1] + rows["url_bytes"][-1] - rows["url_start"][0]))
        begins = (rows["url_start"] - rows["url_start"][0]).tolist()
        urls += [blob[begin : begin + size] for begin, size in zip(begins, rows["url_bytes"].tolist(), strict=True)]
        tables.append(rows)
    rows = np.concatenate(tables).astype(RUN_DTYPE, copy=False)
    keys, ids = rows["key"].tolist(), [row.tobytes() for row in rows["id"]]
    order = sorted(range(len(rows)), key=lambda row: (keys[row], ids[row], urls[row]))
    lengths = rows["length"][order].astype(np.int64)
    return ShardContent(
        tokens=np.concatenate([streams[row] for row in order]),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        text_bytes=rows["text_bytes"][order].astype(np.int64),
        ids=[ids[row].hex() for row in order],
        urls=[urls[row].decode() for row in order],
        metadata=[""] * len(rows),
        first_key=keys[order[0]],
    )


def _pair(rows: npt.NDArray[np.void], first: str, second: str) -> tuple[list[int], list[int]]:
    return rows[first].tolist(), rows[second].tolist()
