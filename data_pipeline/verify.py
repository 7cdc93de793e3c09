"""`pretrain-data verify`: read every byte of a data set and report all damage."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from crc32c import crc32c

from .errors import DataError
from .files import publish_bytes, sha256_file
from .interop import FORMS, index_files
from .layout import (
    INDEX_DTYPE,
    REJECTED_FOLDER,
    SHARD_FOLDER,
    TOKENIZER_FILE,
    BlockLayout,
    documents_path,
    index_bytes,
    index_path,
    read_index,
    rejected_path,
)
from .layout import shard_path as archive_path
from .manifest import Manifest, Shard, read_manifest
from .prepare.workers import run_jobs
from .shard_reading import map_blocks, read_documents
from .shards import misplaced_document


@dataclass(frozen=True)
class Damage:
    """One thing that is not as the manifest says. ``offset`` counts bytes from the start of ``file``."""

    file: str
    problem: str
    shard: str | None = None
    block: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        block = "" if self.block is None else f", block {self.block}"
        offset = "" if self.offset is None else f", byte {self.offset}"
        return f"{self.file}{block}{offset}: {self.problem}"


@dataclass(frozen=True)
class _ShardJob:
    folder: Path
    layout: BlockLayout
    vocab_size: int
    eos_id: int
    shard: Shard


def verify_dataset(folder: Path, processes: int | None = None) -> list[Damage]:
    """Compare every byte of a data set with its manifest: [] when all is well.

    Checked are the hash of every file; each member's tar and npy header, CRC32C, look-ahead token and padding; the
    filling and the end of each archive; ids against the vocabulary; EOS against the document table; the rejected
    records against their counts; the index files for other readers, where there are any.

    Raises:
        UserError: no data set there; DataError: its manifest is damaged.
    """
    manifest = read_manifest(folder)
    jobs = [
        _ShardJob(folder, manifest.layout, manifest.vocab_size, manifest.eos_id, shard) for shard in manifest.shards
    ]
    found = run_jobs(_verify_shard, jobs, processes, "verify", "B", lambda job: job.shard.bytes)
    return [*_stray_files(folder, manifest), *(damage for shard in found for damage in shard)]


def rebuild_indexes(folder: Path) -> list[str]:
    """Write every missing or damaged block index again from its archive; returns the names of those shards.

    Raises:
        DataError: the archive itself is not as the manifest says, so nothing can be rebuilt from it.
    """
    manifest = read_manifest(folder)
    rebuilt: list[str] = []
    for shard in manifest.shards:
        path = index_path(folder, shard.name)
        if path.is_file() and sha256_file(path) == shard.idx_sha256:
            continue
        archive = archive_path(folder, shard.name)
        if not archive.is_file() or sha256_file(archive) != shard.sha256:
            raise DataError(f"the index {path} can't be rebuilt: {archive} is missing or damaged. Restore that first.")
        blocks = map_blocks(archive, manifest.layout, shard.blocks)
        index = np.zeros(shard.blocks, INDEX_DTYPE)
        index["offset"] = [manifest.layout.data_offset(block) for block in range(shard.blocks)]
        index["crc32c"] = [crc32c(block.tobytes()) for block in blocks]
        publish_bytes(path, index_bytes(index))
        rebuilt.append(shard.name)
    return rebuilt


def _stray_files(folder: Path, manifest: Manifest) -> Iterator[Damage]:
    model = folder / TOKENIZER_FILE
    if not model.is_file():
        yield Damage(TOKENIZER_FILE, "missing")
    elif sha256_file(model) != manifest.tokenizer_sha256:
        yield Damage(TOKENIZER_FILE, "is not the tokenizer the shards were written with")
    yield from _rejected_damage(folder, manifest)
    known = {
        path(folder, name) for name in manifest.shards.names for path in (archive_path, index_path, documents_path)
    }
    for form in FORMS:
        for name, content in index_files(manifest, form):
            path = folder / name
            known.add(path)
            if path.is_file() and path.read_bytes() != content:
                advice = f"`pretrain-data index --form {form}` writes it again"
                yield Damage(name, f"is not the index that fits the manifest ({advice})")
    known |= {rejected_path(folder, rejected.name) for rejected in manifest.rejected}
    for name in (SHARD_FOLDER, REJECTED_FOLDER):
        for path in sorted((folder / name).iterdir()) if (folder / name).is_dir() else ():
            if path not in known:
                yield Damage(f"{name}/{path.name}", "is not in the manifest")


def _rejected_damage(folder: Path, manifest: Manifest) -> Iterator[Damage]:
    """Files of rejected records that are missing or damaged; where none is, records that were counted otherwise."""
    sound = True
    listed: Counter[tuple[str, str, str]] = Counter()
    for rejected in manifest.rejected:
        path = rejected_path(folder, rejected.name)
        problem = "missing"
        if path.is_file():
            problem = "" if sha256_file(path) == rejected.sha256 else "its SHA-256 is not that of the manifest"
        if problem:
            sound = False
            yield Damage(f"{REJECTED_FOLDER}/{path.name}", problem)
        elif sound:
            rows = pq.read_table(path, columns=["source", "stage", "reason"]).group_by(["source", "stage", "reason"])
            for row in rows.aggregate([([], "count_all")]).to_pylist():
                listed[row["source"], row["stage"], row["reason"]] += row["count_all"]
    counted = {
        (source, stage, reason): counts["documents"]
        for source, about in manifest.sources.items()
        for stage, reasons in about["rejected"].items()
        for reason, counts in reasons.items()
    }
    for place in sorted({*listed, *counted}) if sound else ():
        if listed[place] != counted.get(place, 0):
            source, stage, reason = place
            what = f"lists {listed[place]} records of source {source!r} rejected by {stage}: {reason}"
            yield Damage(REJECTED_FOLDER, f"{what}, the manifest says {counted.get(place, 0)}")


def _verify_shard(job: _ShardJob) -> list[Damage]:
    found: list[Damage] = []
    for check in (_archive_damage, _index_damage, _table_damage):
        try:
            found += check(job)
        except OSError as error:
            what = f"shard {job.shard.name} can't be read to its end: {error.strerror or error}"
            found.append(Damage(f"{SHARD_FOLDER}/{job.shard.name}.tar", what, job.shard.name))
    return found


def _archive_damage(job: _ShardJob) -> Iterator[Damage]:
    shard, layout, path = job.shard, job.layout, archive_path(job.folder, job.shard.name)
    name = f"{SHARD_FOLDER}/{path.name}"
    if not path.is_file():
        yield Damage(name, "missing", shard.name)
        return
    size = path.stat().st_size
    if size != shard.bytes:
        problem = f"has {size} bytes, the manifest says {shard.bytes}"
        yield Damage(name, problem, shard.name, offset=min(size, shard.bytes))
    digest = hashlib.sha256()
    index = _index_or_none(job)
    previous_look_ahead: int | None = None
    with open(path, "rb") as handle:
        for block in range(shard.blocks):
            start = block * layout.member_stride
            member = handle.read(layout.member_stride)
            digest.update(member)
            if len(member) < layout.member_stride:
                yield Damage(name, "the file ends inside this block", shard.name, block, start + len(member))
                return
            head, tail = layout.member_head(shard.name, block), layout.member_tail()
            data = member[len(head) : len(head) + layout.block_bytes]
            if (at := _first_difference(member[: len(head)], head)) is not None:
                yield Damage(name, "damaged tar or npy header", shard.name, block, start + at)
            if (at := _first_difference(member[len(head) + len(data) :], tail)) is not None:
                yield Damage(name, "padding is not zero", shard.name, block, start + len(head) + len(data) + at)
            if index is not None and crc32c(data) != index["crc32c"][block]:
                yield Damage(name, "CRC32C does not fit", shard.name, block, start + len(head))
            tokens = np.frombuffer(data, layout.token_dtype)
            yield from _token_damage(job, name, block, tokens, previous_look_ahead)
            previous_look_ahead = int(tokens[-1])
        end = handle.read()
        digest.update(end)
    if (at := _first_difference(end, layout.archive_end(shard.blocks))) is not None:
        offset = shard.blocks * layout.member_stride + at
        yield Damage(name, "the end of the archive is not as written", shard.name, offset=offset)
    if digest.hexdigest() != shard.sha256:
        yield Damage(name, f"SHA-256 is {digest.hexdigest()}, the manifest says {shard.sha256}", shard.name)


def _token_damage(
    job: _ShardJob, name: str, block: int, tokens: npt.NDArray[np.unsignedinteger], previous_look_ahead: int | None
) -> Iterator[Damage]:
    shard, layout = job.shard, job.layout
    offset = layout.data_offset(block)

    def at(token: int) -> int:
        return offset + token * layout.token_bytes

    if previous_look_ahead not in (None, int(tokens[0])):
        problem = f"begins with token {tokens[0]}; the block before looks ahead to {previous_look_ahead}"
        yield Damage(name, problem, shard.name, block, offset)
    beyond = np.flatnonzero(tokens >= job.vocab_size)
    if len(beyond):
        problem = f"token {tokens[beyond[0]]} is beyond the vocabulary of {job.vocab_size}"
        yield Damage(name, problem, shard.name, block, at(int(beyond[0])))
    valid = shard.tokens - block * layout.block_tokens
    filling = np.flatnonzero(tokens[valid:] != job.eos_id) if valid < len(tokens) else np.array([], np.int64)
    if len(filling):
        yield Damage(name, "the filling is not EOS", shard.name, block, at(valid + int(filling[0])))


def _index_or_none(job: _ShardJob) -> npt.NDArray[np.void] | None:
    try:
        index = read_index(index_path(job.folder, job.shard.name))
    except DataError:  # reported by _index_damage
        return None
    return index if len(index) == job.shard.blocks else None


def _index_damage(job: _ShardJob) -> Iterator[Damage]:
    shard, path = job.shard, index_path(job.folder, job.shard.name)
    name = f"{SHARD_FOLDER}/{path.name}"
    if not path.is_file():
        yield Damage(name, "missing (`verify --rebuild-sidecars` writes it again)", shard.name)
    elif (found := sha256_file(path)) != shard.idx_sha256:
        problem = f"SHA-256 is {found}, the manifest says {shard.idx_sha256} (`verify --rebuild-sidecars` mends it)"
        yield Damage(name, problem, shard.name)


def _table_damage(job: _ShardJob) -> Iterator[Damage]:
    shard, path = job.shard, documents_path(job.folder, job.shard.name)
    name = f"{SHARD_FOLDER}/{path.name}"
    if not path.is_file():
        yield Damage(name, "missing", shard.name)
        return
    if (found := sha256_file(path)) != shard.docs_sha256:
        yield Damage(name, f"SHA-256 is {found}, the manifest says {shard.docs_sha256}", shard.name)
    try:
        table = read_documents(job.folder, shard)
        if not archive_path(job.folder, shard.name).is_file():  # reported with the archive
            return
        blocks = map_blocks(archive_path(job.folder, shard.name), job.layout, shard.blocks)
    except DataError as error:
        yield Damage(name, str(error), shard.name)
        return
    tokens = blocks[:, :-1].reshape(-1)[: shard.tokens]
    yield from (Damage(name, problem, shard.name) for problem in _disagreements(job, table, tokens))


def _disagreements(job: _ShardJob, table: Any, tokens: npt.NDArray[np.unsignedinteger]) -> Iterator[str]:
    shard = job.shard
    found = np.flatnonzero(tokens == job.eos_id)
    if len(found) != shard.documents + shard.filling:
        filling = f" and {shard.filling} tokens of filling" if shard.filling else ""
        yield f"the shard holds {len(found)} EOS, the manifest says {shard.documents} documents{filling}"
    if table.num_rows != shard.documents:
        yield f"has {table.num_rows} rows, the manifest says {shard.documents} documents"
    starts, lengths = (table[name].to_numpy().astype(np.int64) for name in ("start", "length"))
    if (row := misplaced_document(found, starts, lengths, shard.tokens)) is not None:
        yield f"row {row} says tokens {starts[row]} to {starts[row] + lengths[row]}, which the EOS of the shard do not"
    if (text_bytes := int(table["text_bytes"].to_numpy().sum())) != shard.text_bytes:
        yield f"its text_bytes add up to {text_bytes}, the manifest says {shard.text_bytes}"
    if set(table["domain"].to_pylist()) - {shard.domain}:
        yield f"a row is not of domain {shard.domain}"


def _first_difference(found: bytes, expected: bytes) -> int | None:
    if found == expected:
        return None
    shared = min(len(found), len(expected))
    differs = np.frombuffer(found[:shared], np.uint8) != np.frombuffer(expected[:shared], np.uint8)
    return int(np.argmax(differs)) if differs.any() else shared
