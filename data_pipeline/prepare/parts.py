"""Pass 1: tokenise one part of the input into runs of documents sorted by a keyed hash.

A run is three files: ``.tokens`` (the documents' tokens, each with its EOS), ``.docs.npy`` (a table of
:data:`RUN_DTYPE`) and ``.urls`` (their text, end to end). Its training documents come first, then the held-out ones,
each sorted by key. The key of a document depends on the seed and its content only; cut by ranges of keys, the
runs of all parts make a uniform shuffle of all documents whatever the parts were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..files import publish, publish_json
from ..manifest import HELDOUT, TRAIN
from ..sources import Document, Part, Source
from ..tokenizer import Tokenizer

ID_BYTES = 16

RUN_DTYPE = np.dtype(
    [
        ("key", "<u8"),
        ("id", "u1", (ID_BYTES,)),
        ("start", "<u8"),
        ("length", "<u8"),
        ("text_bytes", "<u8"),
        ("url_start", "<u8"),
        ("url_bytes", "<u8"),
    ]
)

_BATCH_BYTES = 1 << 20


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
    def record(self) -> Path:
        """Published when all runs of the part are."""
        return self.folder / f"{self.number:06d}.json"


@dataclass(frozen=True)
class _Encoded:
    split: str
    key: int
    id: bytes
    url: bytes
    text_bytes: int
    tokens: npt.NDArray[np.unsignedinteger]

    @property
    def rank(self) -> tuple[bool, int, bytes, bytes]:
        return self.split == HELDOUT, self.key, self.id, self.url


def content_id(utf8: bytes) -> bytes:
    """The identity of a document: a 128-bit hash of its text."""
    return blake2b(utf8, digest_size=ID_BYTES).digest()


def is_heldout(identity: bytes, fraction: float) -> bool:
    """Whether a document is held out: a function of its content alone, so duplicates fall on one side."""
    draw = blake2b(identity, digest_size=8, key=b"heldout").digest()
    return int.from_bytes(draw, "little") < int(fraction * (1 << 64))


def shuffle_key(identity: bytes, seed: int) -> int:
    """The place of a document in the shuffle, uniform in [0, 2^64)."""
    return int.from_bytes(blake2b(identity, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def tokenise_part(job: PartJob) -> dict[str, Any]:
    """Write the runs of a part and its record; a part that has its record is not done again.

    Returns:
        The record: ``source``, ``domain``, ``runs`` (name, documents and tokens by split) and counts: ``documents``,
        ``empty_documents`` (left out), ``inexact_documents`` (their tokens do not stand for all their bytes; an exact
        tokenizer has none), ``text_bytes``, ``tokens``.
    """
    if job.record.exists():
        record: dict[str, Any] = json.loads(job.record.read_bytes())
        return record
    tokenizer = _load_tokenizer(job.tokenizer)
    counts = {"documents": 0, "empty_documents": 0, "inexact_documents": 0, "text_bytes": 0, "tokens": 0}
    runs: list[dict[str, Any]] = []
    run: list[_Encoded] = []
    run_bytes = 0
    for batch in _batches(job.source.read(job.part), counts):
        encoded = _encode(batch, tokenizer, job, counts)
        run += encoded
        run_bytes += sum(document.text_bytes for document in encoded)
        if run_bytes >= job.run_bytes:
            runs.append(_write_run(job, len(runs), run))
            run, run_bytes = [], 0
    if run:
        runs.append(_write_run(job, len(runs), run))
    record = {"source": job.source_name, "domain": job.source.domain, "runs": runs, **counts}
    publish_json(job.record, record)
    return record


@lru_cache(maxsize=1)
def _load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def _batches(documents: Iterator[Document], counts: dict[str, int]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if not document.text:
            counts["empty_documents"] += 1
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_BYTES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: Tokenizer, job: PartJob, counts: dict[str, int]) -> list[_Encoded]:
    eos = np.array([tokenizer.eos_id], np.int32)
    encoded: list[_Encoded] = []
    for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True):
        utf8 = document.text.encode()
        identity = content_id(utf8)
        if tokenizer.eos_id in ids:
            raise DataError(f"{document.url}: the tokenizer made EOS of its text. Train another tokenizer.")
        encoded.append(
            _Encoded(
                split=HELDOUT if is_heldout(identity, job.heldout_fraction) else TRAIN,
                key=shuffle_key(identity, job.seed),
                id=identity,
                url=document.url.encode(),
                text_bytes=len(utf8),
                tokens=np.concatenate([ids, eos]).astype(tokenizer.dtype),
            )
        )
        counts["inexact_documents"] += int(tokenizer.piece_bytes[ids].sum()) != len(utf8)
        counts["text_bytes"] += len(utf8)
        counts["tokens"] += len(ids) + 1
    counts["documents"] += len(batch)
    return encoded


def _write_run(job: PartJob, number: int, documents: list[_Encoded]) -> dict[str, Any]:
    name = f"{job.number:06d}-{number:04d}"
    documents = sorted(documents, key=lambda document: document.rank)
    table = np.zeros(len(documents), RUN_DTYPE)
    table["key"] = [document.key for document in documents]
    table["id"] = np.frombuffer(b"".join(document.id for document in documents), np.uint8).reshape(-1, ID_BYTES)
    table["length"] = [len(document.tokens) for document in documents]
    table["start"] = np.cumsum(table["length"]) - table["length"]
    table["text_bytes"] = [document.text_bytes for document in documents]
    table["url_bytes"] = [len(document.url) for document in documents]
    table["url_start"] = np.cumsum(table["url_bytes"]) - table["url_bytes"]
    with publish(job.folder / f"{name}.tokens") as handle:
        for document in documents:
            handle.write(document.tokens.astype(document.tokens.dtype.newbyteorder("<"), copy=False).tobytes())
    with publish(job.folder / f"{name}.urls") as handle:
        handle.write(b"".join(document.url for document in documents))
    with publish(job.folder / f"{name}.docs.npy") as handle:
        np.save(handle, table)
    splits = {}
    for split in (TRAIN, HELDOUT):
        lengths = [len(document.tokens) for document in documents if document.split == split]
        splits[split] = {"documents": len(lengths), "tokens": sum(lengths)}
    return {"name": name, **splits}
