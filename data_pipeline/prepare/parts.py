"""Pass 1: tokenise one part of the input into runs of documents sorted by a keyed hash.

The key of a document depends on the seed and its content only; cut by ranges of keys, the runs of all parts make a
uniform shuffle of all documents whatever the parts were.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..files import publish_json
from ..manifest import HELDOUT, TRAIN
from ..sources import Document, Part, Rejected, Source
from ..tokenizer import Tokenizer
from .runs import ID_BYTES, Documents, IntArray, write_run

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

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"part {self.number:06d}"

    @property
    def record(self) -> Path:
        """Published when all runs of the part are."""
        return self.folder / f"{self.number:06d}.json"


@dataclass
class _Counts:
    documents: int = 0
    empty_documents: int = 0
    inexact_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    dropped_records: Counter[str] = field(default_factory=Counter)


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
    ``documents``, ``empty_documents`` (without text or tokens; left out), ``inexact_documents`` (their tokens do not
    stand for all their bytes; an exact tokenizer has none), ``text_bytes``, ``tokens``, ``dropped_records`` (by
    reason).
    """
    tokenizer = _load_tokenizer(job.tokenizer)
    counts = _Counts()
    runs: list[dict[str, Any]] = []
    pieces: list[Documents] = []
    run_bytes = 0
    for batch in _batches(job.source.read(job.part), counts):
        piece = _encode(batch, tokenizer, job, counts)
        pieces.append(piece)
        run_bytes += int(piece.text_bytes.sum())
        if run_bytes >= job.run_bytes:
            runs += _write_run(job, len(runs), pieces)
            pieces, run_bytes = [], 0
    runs += _write_run(job, len(runs), pieces)
    publish_json(job.record, {"source": job.source_name, "domain": job.source.domain, "runs": runs, **vars(counts)})


@lru_cache(maxsize=1)
def _load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def _batches(records: Iterable[Document | Rejected], counts: _Counts) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for record in records:
        if isinstance(record, Rejected):
            counts.dropped_records[record.reason] += 1
            continue
        if not record.text:
            counts.empty_documents += 1
            continue
        batch.append(record)
        characters += len(record.text)
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
        covered = np.add.reduceat(tokenizer.piece_bytes[tokens], np.cumsum(lengths) - lengths)
        counts.inexact_documents += int(np.count_nonzero(covered != text_bytes))
    return Documents(
        keys=_keyed_hashes(identities, job.seed.to_bytes(8, "little")),
        ids=np.frombuffer(b"".join(identities), np.uint8).reshape(-1, ID_BYTES),
        lengths=lengths,
        text_bytes=text_bytes,
        urls=[document.url.encode() for document in batch],
        metadata=[json.dumps(d.metadata, sort_keys=True).encode() if d.metadata else b"" for d in batch],
        tokens=tokens,
    )


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


def _heldout(identities: Sequence[bytes], fraction: float) -> npt.NDArray[np.bool_]:
    return _keyed_hashes(identities, b"heldout") < np.uint64(int(fraction * (1 << 64)))


def _write_run(job: PartJob, number: int, pieces: list[Documents]) -> list[dict[str, Any]]:
    if not sum(map(len, pieces)):
        return []
    documents = Documents.joined(pieces)
    heldout = _heldout([row.tobytes() for row in documents.ids], job.heldout_fraction)
    chosen = {split: documents.shuffled(np.flatnonzero(heldout == (split == HELDOUT))) for split in (TRAIN, HELDOUT)}
    name = f"{job.number:06d}-{number:04d}"
    write_run(job.folder / name, documents, np.concatenate([chosen[TRAIN], chosen[HELDOUT]]))
    counted = {
        split: {"documents": len(rows), "tokens": int(documents.lengths[rows].sum())} for split, rows in chosen.items()
    }
    return [{"name": name, **counted}]
