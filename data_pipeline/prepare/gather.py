"""Pass 2: shard k of S takes the documents whose keys lie in [k/S, (k+1)/S) from every run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..layout import BlockLayout
from ..manifest import SPLITS
from ..packing import Packing, best_fit, end_to_end
from ..shards import ShardContent, write_shard
from .checked_files import opened, publish_record, read_record
from .runs import ID_BYTES, Documents, IntArray, Run, Tokens
from .workers import run_jobs
from .workspace import Workspace

_RUNS_AT_ONCE = 64


@dataclass(frozen=True)
class Format:
    """How shards are written."""

    layout: BlockLayout
    eos_id: int
    pack_tokens: int | None


@dataclass(frozen=True)
class ShardJob:
    """One shard to write; everything a worker process needs. ``tokens``: of its documents, without filling."""

    folder: Path
    name: str
    domain: str
    split: str
    index: int
    count: int
    tokens: int
    format: Format

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"shard {self.name}"

    @property
    def record(self) -> Path:
        """Published when the shard's files are."""
        return Workspace(self.folder).shard_records / f"{self.name}.json"


def plan_shards(
    workspace: Workspace,
    records: Sequence[dict[str, Any]],
    dropped: Mapping[str, dict[str, Any]],
    shard_tokens: int,
    processes: int | None,
) -> None:
    """Cut every (split, domain) into ceil(tokens / shard_tokens) ranges of keys, and publish the cuts.

    Args:
        records: what the first pass recorded of each part.
        dropped: :func:`.compare.dropped_totals`; empty if duplicates stay.

    Raises:
        UserError: over a million shards.
    """
    runs: dict[str, dict[str, list[tuple[str, int, int, bool]]]] = {split: {} for split in SPLITS}
    groups: list[dict[str, Any]] = []
    for split in SPLITS:
        for domain in sorted({record["domain"] for record in records}):
            own = [record for record in records if record["domain"] == domain]
            described = [run for record in own for run in record["runs"]]
            found = [Run.of(workspace.parts, run, split, bool(dropped)) for run in described if run[split]["documents"]]
            gone = sum(dropped[source]["tokens"][split] for source in {record["source"] for record in own} if dropped)
            count = -(-(sum(run[split]["tokens"] for run in described) - gone) // shard_tokens)
            tokens = _tokens_per_range(found if count else (), count, processes)
            filled = np.flatnonzero(tokens).tolist()
            groups.append(
                {"split": split, "domain": domain, "count": count, "index": filled, "tokens": tokens[filled].tolist()}
            )
            runs[split][domain] = [(Path(run.path).name, run.first, run.last, run.deduplicated) for run in found]
    if (shards := sum(len(group["index"]) for group in groups)) > 1_000_000:
        raise UserError(f"{shards} shards are too many (names have six digits). Raise shard_tokens.")
    publish_record(workspace.shard_runs, runs)
    publish_record(workspace.shard_plan, groups)


def shard_jobs(workspace: Workspace, written: Format) -> list[ShardJob]:
    """The shards of the published plan. A range without documents is no shard; training shards come first, then
    held-out ones, domains in sorted order."""
    jobs: list[ShardJob] = []
    for group in read_record(workspace.shard_plan):
        for index, tokens in zip(group["index"], group["tokens"], strict=True):
            place = (f"{len(jobs):06d}", group["domain"], group["split"], index, group["count"], tokens)
            jobs.append(ShardJob(workspace.folder, *place, written))
    return jobs


def gather_shard(job: ShardJob) -> None:
    """Write one shard, then its record: its row of the manifest."""
    layout, eos_id = job.format.layout, job.format.eos_id
    shard = write_shard(job.folder, job.name, job.domain, job.split, layout, eos_id, _content(job))
    publish_record(job.record, shard.model_dump(mode="json"))


@dataclass(frozen=True)
class _CountJob:
    runs: tuple[Run, ...]
    count: int


def _tokens_per_range(runs: Sequence[Run], count: int, processes: int | None) -> IntArray:
    """[count] the tokens of all runs in each of ``count`` ranges of keys."""
    jobs = [
        _CountJob(tuple(runs[first : first + _RUNS_AT_ONCE]), count) for first in range(0, len(runs), _RUNS_AT_ONCE)
    ]
    several = len(jobs) > 1
    counted = run_jobs(_count_tokens, jobs, processes, "plan", "run", _runs_of) if several else map(_count_tokens, jobs)
    total: IntArray = np.sum([np.zeros(count, np.int64), *counted], axis=0)
    return total


def _runs_of(job: _CountJob) -> int:
    return len(job.runs)


def _count_tokens(job: _CountJob) -> IntArray:
    cuts = np.array([_cut(k, job.count) for k in range(1, job.count)], np.uint64)
    total: IntArray = np.sum([run.tokens_per_range(cuts) for run in job.runs], axis=0)
    return total


def _cut(k: int, count: int) -> int:
    """The key with which range ``k`` of ``count`` begins."""
    return (k << 64) // count


@lru_cache(maxsize=1)
def _runs(path: Path, modified: int) -> dict[str, dict[str, list[Run]]]:
    parts = Workspace(path.parent.parent).parts
    listed = read_record(path)
    return {
        split: {domain: [Run(str(parts / name), *place) for name, *place in runs] for domain, runs in of.items()}
        for split, of in listed.items()
    }


def _content(job: ShardJob) -> ShardContent:
    layout, path = job.format.layout, Workspace(job.folder).shard_runs
    low, high = _cut(job.index, job.count), _cut(job.index + 1, job.count)
    with opened(path) as handle:
        runs = _runs(path, os.fstat(handle.fileno()).st_mtime_ns)[job.split][job.domain]
    pieces = [piece for run in runs if (piece := run.read(low, high, layout.token_dtype)) is not None]
    tokens = [own for piece in pieces for own in piece.each_tokens()]
    # without their tokens, which are most of them and are copied once, to their places in the stream
    documents = Documents.joined([replace(piece, tokens=piece.tokens[:0]) for piece in pieces])
    shuffled = documents.shuffled(np.arange(len(documents)))
    lengths = documents.lengths[shuffled]
    packing = end_to_end(lengths) if job.format.pack_tokens is None else best_fit(lengths, job.format.pack_tokens)
    order = shuffled[packing.order]
    rows = order.tolist()
    ids = documents.ids[order].tobytes().hex()
    return ShardContent(
        tokens=_stream([tokens[row] for row in rows], packing, job.format),
        starts=packing.starts,
        lengths=documents.lengths[order],
        text_bytes=documents.text_bytes[order],
        ids=[ids[begin : begin + 2 * ID_BYTES] for begin in range(0, len(ids), 2 * ID_BYTES)],
        urls=[documents.urls[row].decode() for row in rows],
        metadata=[documents.metadata[row].decode() for row in rows],
        first_key=int(documents.keys[shuffled[0]]),
    )


def _stream(tokens: Sequence[Tokens], packing: Packing, written: Format) -> Tokens:
    """The documents ``tokens``, in the order of the stream, at their places in it."""
    if packing.tokens == sum(map(len, tokens)):
        return np.concatenate(tokens, dtype=written.layout.token_dtype)
    stream = np.full(packing.tokens, written.eos_id, written.layout.token_dtype)
    for place, document in zip(packing.starts.tolist(), tokens, strict=True):
        stream[place : place + len(document)] = document
    return stream
