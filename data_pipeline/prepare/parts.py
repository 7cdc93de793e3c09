"""Pass 1: tokenise one part of the input into runs of documents sorted by a keyed hash.

The key of a document depends on the seed and its content only; cut by ranges of keys, the runs of all parts make a
uniform shuffle of all documents whatever the parts were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cleaning import Cleaner, CleaningSettings, Rejection
from ..cleaning.near_duplicates import Signer
from ..errors import DataError
from ..manifest import HELDOUT, TRAIN
from ..sources import Document, Part, Rejected, Source
from ..sources.base import encodable
from ..sources.records import strict_json
from ..storage import StorageSettings
from ..tokenizer import Tokenizer
from .accounts import Rejected as RejectedCounts
from .accounts import count_rejected
from .checked_files import publish_record, publish_rows
from .rejected import Rejects, rejected_row, write_rejects
from .runs import ID_BYTES, Documents, IntArray, write_run
from .settings import PrepareSettings
from .workspace import Workspace

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class PartJob:
    """One part to tokenise; everything a worker process needs."""

    number: int
    source_name: str
    source: Source
    part: Part
    folder: Path
    tokenizer: Path
    seed: int
    heldout_fraction: float
    run_bytes: int
    cleaning: CleaningSettings
    storage: StorageSettings
    stamps: Mapping[str, Any]
    """Of the part's own files, as all tasks have agreed on them."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"part {self.number:06d}"

    @property
    def record(self) -> Path:
        """Published when all runs of the part are."""
        return self.folder / f"{self.number:06d}.json"

    @property
    def rejected(self) -> Path:
        """The records of the part that are left out, if there are any."""
        return self.folder / f"{self.number:06d}.rejected.parquet"


def part_jobs(
    settings: PrepareSettings, workspace: Workspace, stamps: Mapping[str, Mapping[str, Any]]
) -> list[PartJob]:
    """The parts of all sources, in the order of the configuration. ``stamps``: of each source's input.

    Raises:
        UserError: input is missing or unreadable.
    """
    jobs: list[PartJob] = []
    for name, source in settings.sources.items():
        for part in source.parts(settings.part_bytes, settings.storage):
            own = {encodable(span.path) for span in part.spans}
            jobs.append(
                PartJob(
                    number=len(jobs),
                    source_name=name,
                    source=source,
                    part=part,
                    folder=workspace.parts,
                    tokenizer=workspace.tokenizer,
                    seed=settings.seed,
                    heldout_fraction=settings.heldout_fraction,
                    run_bytes=settings.part_bytes,
                    cleaning=settings.cleaning,
                    storage=settings.storage,
                    stamps={path: stamp for path, stamp in stamps[name].items() if path in own},
                )
            )
    return jobs


class _Counts:
    """What becomes of the records of one part."""

    def __init__(self, job: PartJob) -> None:
        self._job = job
        self.records = 0
        self.documents = 0
        self.empty_documents = 0
        self.normalised_documents = 0
        self.inexact_documents = 0
        self.text_bytes = 0
        self.tokens = 0
        self.rejected: RejectedCounts = {}
        self.rows: Rejects = []

    def reject(self, record: Rejected | Rejection) -> None:
        """Count a record that is left out, and keep a row of it."""
        if isinstance(record, Rejected):
            record = Rejection("source", record.reason, record.message, record.url, "")
        utf8 = record.text.encode()
        count_rejected(self.rejected, record.stage, record.reason, len(utf8))
        identity = content_id(utf8) if utf8 else b""
        self.rows.append(
            rejected_row(record, self._job.source_name, identity, len(utf8), self._job.cleaning.rejected_characters)
        )

    def as_json(self) -> dict[str, Any]:
        """The counts, and how many rows of rejected records there are."""
        counts = {name: value for name, value in vars(self).items() if name not in ("_job", "rows")}
        return {**counts, "rejected_rows": len(self.rows)}


def content_id(utf8: bytes) -> bytes:
    """The identity of a document: a 128-bit hash of its text."""
    return blake2b(utf8, digest_size=ID_BYTES).digest()


def is_heldout(identity: bytes, fraction: float) -> bool:
    """Whether a document is held out: a function of its content alone, so duplicates fall on one side."""
    return bool(_heldout([identity], fraction)[0])


def shuffle_key(identity: bytes, seed: int) -> int:
    """The place of a document in the shuffle, uniform in [0, 2^64)."""
    return int(_keyed_hashes([identity], seed.to_bytes(8, "little"))[0])


def tokenise_part(job: PartJob) -> None:
    """Write the runs of a part, then its record.

    The record (JSON) holds ``source``, ``domain``, ``runs`` (name, documents and tokens by split) and counts:
    ``records``, ``documents``, ``empty_documents`` (without text or tokens; left out), ``normalised_documents``
    (changed by it), ``inexact_documents`` (their tokens do not stand for all their bytes; an exact tokenizer has none),
    ``text_bytes``, ``tokens``, ``rejected`` (by stage and reason), ``rejected_rows`` (in the file of rejected records).
    """
    tokenizer = _load_tokenizer(job.tokenizer, job.tokenizer.stat().st_mtime_ns)
    counts = _Counts(job)
    runs: list[dict[str, Any]] = []
    pieces: list[Documents] = []
    run_bytes = 0
    for batch in _batches(job.source.read(job.part, job.storage), make_cleaner(job.cleaning), counts):
        piece = _encode(batch, tokenizer, job, counts)
        pieces.append(piece)
        run_bytes += int(piece.text_bytes.sum())
        if run_bytes >= job.run_bytes:
            runs += _write_run(job, len(runs), pieces)
            pieces, run_bytes = [], 0
    runs += _write_run(job, len(runs), pieces)
    if counts.rows:
        write_rejects(job.rejected, counts.rows)
    job.source.check_unchanged(job.part, job.stamps)
    about = {"source": job.source_name, "domain": job.source.domain, "runs": runs}
    publish_record(job.record, {**about, **counts.as_json()})


@lru_cache(maxsize=1)
def _load_tokenizer(path: Path, modified: int) -> Tokenizer:
    return Tokenizer.load(path)


@lru_cache(maxsize=1)
def make_cleaner(settings: CleaningSettings) -> Cleaner:
    """The stages that look at one document at a time; kept for the next part."""
    return Cleaner(settings)


@lru_cache(maxsize=1)
def _signer(settings: CleaningSettings) -> Signer | None:
    return Signer(settings.near_duplicates) if settings.near_duplicates else None


def _batches(records: Iterable[Document | Rejected], cleaner: Cleaner, counts: _Counts) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for record in records:
        counts.records += 1
        document = record if isinstance(record, Rejected) else cleaner.clean(record)
        if not isinstance(document, Document):
            counts.reject(document)
            continue
        if not document.text:
            counts.empty_documents += 1
            continue
        counts.normalised_documents += isinstance(record, Document) and document.text != record.text
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: Tokenizer, job: PartJob, counts: _Counts) -> Documents:
    encoded = tokenizer.encode_batch([document.text for document in batch])
    if not all(map(len, encoded)):
        kept = [row for row, ids in enumerate(encoded) if len(ids)]
        counts.empty_documents += len(batch) - len(kept)
        batch, encoded = [batch[row] for row in kept], [encoded[row] for row in kept]
    utf8 = [document.text.encode() for document in batch]
    identities = [content_id(text) for text in utf8]
    text_bytes = np.array([len(text) for text in utf8], np.int64)
    tokens, lengths = _with_ends(encoded, tokenizer, batch)
    counts.documents += len(batch)
    counts.text_bytes += int(text_bytes.sum())
    counts.tokens += len(tokens)
    if batch:
        covered = tokenizer.bytes_of(tokens, lengths)
        counts.inexact_documents += int(np.count_nonzero(covered != text_bytes))
    return Documents(
        keys=_keyed_hashes(identities, job.seed.to_bytes(8, "little")),
        ids=np.frombuffer(b"".join(identities), np.uint8).reshape(-1, ID_BYTES),
        lengths=lengths,
        text_bytes=text_bytes,
        urls=[document.url.encode() for document in batch],
        metadata=[strict_json(d.metadata) if d.metadata else b"" for d in batch],
        tokens=tokens,
        signatures=_signatures(batch, _signer(job.cleaning)),
    )


def _signatures(batch: Sequence[Document], signer: Signer | None) -> npt.NDArray[np.uint32]:
    if signer is None or not batch:
        return np.zeros((len(batch), 0 if signer is None else signer.permutations), np.uint32)
    return np.stack([signer.sign(document.text) for document in batch])


def _with_ends(
    encoded: Sequence[npt.NDArray[np.int32]], tokenizer: Tokenizer, batch: list[Document]
) -> tuple[npt.NDArray[np.unsignedinteger], IntArray]:
    """The documents end to end, each with EOS, and their lengths."""
    eos = np.array([tokenizer.eos_id], np.int32)
    pieces = [piece for ids in encoded for piece in (ids, eos)]
    tokens = np.concatenate([*pieces, eos[:0]], dtype=tokenizer.dtype, casting="unsafe")
    if np.count_nonzero(tokens == tokenizer.eos_id) != len(batch):
        wrong = next(d for d, ids in zip(batch, encoded, strict=True) if tokenizer.eos_id in ids)
        raise DataError(f"{wrong.url}: the tokenizer made EOS of its text. Train another tokenizer.")
    return tokens, np.array([len(ids) + 1 for ids in encoded], np.int64)


def _keyed_hashes(identities: Sequence[bytes], key: bytes) -> npt.NDArray[np.uint64]:
    """[n] a 64-bit hash of each identity under ``key``."""
    empty = blake2b(digest_size=8, key=key)
    digests: list[bytes] = []
    for identity in identities:
        state = empty.copy()
        state.update(identity)
        digests.append(state.digest())
    return np.frombuffer(b"".join(digests), "<u8")


def _identities(ids: npt.NDArray[np.uint8]) -> list[bytes]:
    joined = ids.tobytes()
    return [joined[begin : begin + ID_BYTES] for begin in range(0, len(joined), ID_BYTES)]


def _heldout(identities: Sequence[bytes], fraction: float) -> npt.NDArray[np.bool_]:
    return _keyed_hashes(identities, b"heldout") < np.uint64(int(fraction * (1 << 64)))


def _write_run(job: PartJob, number: int, pieces: list[Documents]) -> list[dict[str, Any]]:
    if not sum(map(len, pieces)):
        return []
    documents = Documents.joined(pieces)
    heldout = _heldout(_identities(documents.ids), job.heldout_fraction)
    chosen = {split: documents.shuffled(np.flatnonzero(heldout == (split == HELDOUT))) for split in (TRAIN, HELDOUT)}
    name = f"{job.number:06d}-{number:04d}"
    order = np.concatenate([chosen[TRAIN], chosen[HELDOUT]])
    if signer := _signer(job.cleaning):
        signatures = documents.signatures[order]
        publish_rows(job.folder / f"{name}.minhash", signatures)
        publish_rows(job.folder / f"{name}.bands", signer.bands(signatures).reshape(-1))
    write_run(job.folder / name, documents, order)
    counted = {
        split: {"documents": len(rows), "tokens": int(documents.lengths[rows].sum())} for split, rows in chosen.items()
    }
    return [{"name": name, **counted}]
