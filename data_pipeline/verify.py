"""`pretrain-data verify`: read every byte of a data set and report all damage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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
    documents_path,
    index_bytes,
    index_path,
    rejected_path,
)
from .layout import shard_path as archive_path
from .manifest import Manifest, read_manifest
from .prepare.workers import run_jobs
from .shard_reading import map_blocks
from .verify_shard import ARCHIVE, INDEX, TABLE, Checked, ShardJob, verify_shard
from .verify_shard import Damage as Damage


def verify_dataset(folder: Path, processes: int | None = None) -> list[Damage]:
    """Compare every byte of a data set with its manifest: [] when all is well, else an entry for each cause.

    Checked are the hash of every file; each member's tar and npy header, CRC32C, look-ahead token and padding; the
    filling and the end of each archive; ids against the vocabulary; EOS against the document table; the rejected
    records against their counts; the index files for other readers, where there are any.

    Raises:
        UserError: no data set there; DataError: its manifest is damaged.
    """
    manifest = read_manifest(folder)
    jobs = [ShardJob(folder, manifest.layout, manifest.vocab_size, manifest.eos_id, shard) for shard in manifest.shards]
    found = run_jobs(verify_shard, jobs, processes, "verify", "B", lambda job: job.shard.bytes)
    return [*_stray_files(folder, manifest), *_with_names_of_others(manifest, found)]


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


def _with_names_of_others(manifest: Manifest, found: list[Checked]) -> Iterator[Damage]:
    """All damage; where a file holds what belongs to another shard, that in place of all its differences."""
    known: dict[bytes, str] = {}
    if any(checked.strange for checked in found):
        shards = manifest.shards
        for kind, hashes in ((ARCHIVE, shards.sha256), (INDEX, shards.idx_sha256), (TABLE, shards.docs_sha256)):
            known |= {sha256.tobytes(): f"{name}.{kind}" for name, sha256 in zip(shards.names, hashes, strict=True)}
    for checked in found:
        others = {file: known.get(bytes.fromhex(sha256)) for file, sha256 in checked.strange.items()}
        told: set[str] = set()
        for damage in checked.damage:
            if (other := others.get(damage.file)) is None:
                yield damage
            elif damage.file not in told:
                told.add(damage.file)
                yield Damage(damage.file, f"this is the content of {SHARD_FOLDER}/{other} (same SHA-256)", damage.shard)
