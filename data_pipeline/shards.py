"""Writing one shard: the archive, its block index and its document table."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from .arrow import numbers, strings
from .errors import DataError
from .files import publish, publish_bytes
from .layout import INDEX_DTYPE, BlockLayout, documents_path, index_bytes, index_path, shard_path
from .manifest import Shard

if TYPE_CHECKING:
    from typing_extensions import Buffer

DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("start", pa.uint64()),
        pa.field("length", pa.uint64()),
        pa.field("text_bytes", pa.uint64()),
        pa.field("id", pa.string()),
        pa.field("domain", pa.string()),
        pa.field("url", pa.string()),
        pa.field("metadata", pa.string()),
    ]
)
"""One row per document, in the order of the stream: its first token in the shard, its tokens (EOS included), its text's
UTF-8 bytes, the hex hash of its text, its domain, where it came from, and what else its source said of it (a JSON
object, or empty)."""

_ROW_GROUP = 1 << 16
_GROUP_CHARACTERS = 1 << 28


@dataclass(frozen=True)
class ShardContent:
    """The documents of one shard, in order.

    Attributes:
        tokens: [tokens] the stream ``doc EOS doc EOS ...`` in the layout's dtype; between documents more EOS may stand.
        starts: [documents] the first token of each document, ascending.
        lengths: [documents] tokens of each document, its EOS included.
        text_bytes: [documents] UTF-8 bytes of each document's text.
        ids: hex content hash of each document.
        urls: where each document came from.
        metadata: what else the source said of each document: a JSON object, or empty.
        first_key: the smallest shuffle key of the documents.
    """

    tokens: npt.NDArray[np.unsignedinteger]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    ids: list[str]
    urls: list[str]
    metadata: list[str]
    first_key: int


def write_shard(
    folder: Path, name: str, domain: str, split: str, layout: BlockLayout, eos_id: int, content: ShardContent
) -> Shard:
    """Publish the three files of shard ``name`` of the data set ``folder`` and return its manifest row.

    Equal content gives equal bytes. The stream is cut into blocks of ``layout.block_tokens``; each block also holds
    the next one's first token, and what the last block lacks is filled with EOS. The row's hashes are of what was to be
    written, not of what is read back.

    Raises:
        DataError: EOS stands anywhere but at the end of each document (a tokenizer that emits EOS for text).
        OSError: the disk.
    """
    _check_document_ends(name, eos_id, content)
    shard_path(folder, name).parent.mkdir(parents=True, exist_ok=True)
    blocks = layout.blocks(len(content.tokens))
    index = np.zeros(blocks, INDEX_DTYPE)
    index["offset"] = [layout.data_offset(block) for block in range(blocks)]
    digest = hashlib.sha256()
    with publish(shard_path(folder, name)) as archive:
        for block in range(blocks):
            data = block_bytes(layout, eos_id, content.tokens, block)
            index["crc32c"][block] = crc32c(data)
            for piece in (layout.member_head(name, block), data, layout.member_tail()):
                digest.update(piece)
                archive.write(piece)
        end = layout.archive_end(blocks)
        digest.update(end)
        archive.write(end)
    sidecar = index_bytes(index)
    publish_bytes(index_path(folder, name), sidecar)
    docs_sha256 = _write_documents(documents_path(folder, name), domain, content)
    return Shard.model_validate(
        {
            "name": name,
            "domain": domain,
            "split": split,
            "bytes": layout.shard_bytes(blocks),
            "blocks": blocks,
            "tokens": len(content.tokens),
            "filling": len(content.tokens) - int(content.lengths.sum()),
            "first_key": content.first_key,
            "documents": len(content.lengths),
            "text_bytes": int(content.text_bytes.sum()),
            "sha256": digest.hexdigest(),
            "idx_sha256": hashlib.sha256(sidecar).hexdigest(),
            "docs_sha256": docs_sha256,
        }
    )


def block_bytes(layout: BlockLayout, eos_id: int, tokens: npt.NDArray[np.unsignedinteger], block: int) -> bytes:
    """The little-endian bytes of one block of the stream ``tokens`` [tokens], look-ahead and filling included."""
    first = block * layout.block_tokens
    valid = tokens[first : first + layout.block_tokens + 1]
    if len(valid) == layout.block_tokens + 1:
        return valid.astype(layout.token_dtype, copy=False).tobytes()
    padded = np.full(layout.block_tokens + 1, eos_id, layout.token_dtype)
    padded[: len(valid)] = valid
    return padded.tobytes()


def _check_document_ends(name: str, eos_id: int, content: ShardContent) -> None:
    ends = np.flatnonzero(content.tokens == eos_id)
    document = misplaced_document(ends, content.starts, content.lengths, len(content.tokens))
    if document is not None:
        begin, end = int(content.starts[document]), int(content.starts[document] + content.lengths[document])
        raise DataError(
            f"shard {name}: document {content.ids[document]} ({content.urls[document]}, tokens {begin} to {end} of the "
            "shard) has an EOS inside or none at its end, so its boundary could not be found again. Train another "
            "tokenizer."
        )


def misplaced_document(
    eos: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], tokens: int
) -> int | None:
    """The first document that does not reach from ``start`` to an EOS without another one inside, or does not follow
    the one before with nothing but EOS between; ``None`` if all do.

    Args:
        eos: places of EOS in a stream of ``tokens`` tokens, ascending.
        starts: [documents] the first token of each document.
        lengths: [documents] tokens of each, its EOS included.
    """
    ends = starts + lengths
    before = np.concatenate([[0], ends])[:-1]
    # EOS up to `end` but not at `end - 1` or inside the gap before: none
    inside = np.searchsorted(eos, ends - 1) - np.searchsorted(eos, starts)
    last = np.searchsorted(eos, ends) - np.searchsorted(eos, ends - 1)
    gap = np.searchsorted(eos, starts) - np.searchsorted(eos, before)
    wrong = (starts < before) | (lengths < 1) | (ends > tokens) | (inside != 0) | (last != 1) | (gap != starts - before)
    if wrong.any():
        return int(np.argmax(wrong))
    rest = tokens - (int(ends[-1]) if len(ends) else 0)
    if len(eos) == len(ends) + int((starts - before).sum()) + rest:
        return None
    return len(ends) - 1


class _Hashed(io.RawIOBase):
    """What is written to it goes to ``handle`` and into ``digest``."""

    def __init__(self, handle: BinaryIO) -> None:
        super().__init__()
        self._handle, self.digest = handle, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Buffer) -> int:
        self.digest.update(content)
        return self._handle.write(content)


def _write_documents(path: Path, domain: str, content: ShardContent) -> str:
    """Publish the table of documents; its SHA-256."""
    sizes = np.array(
        [len(url) + len(about) for url, about in zip(content.urls, content.metadata, strict=True)], np.int64
    )
    with publish(path) as handle:
        hashed = _Hashed(handle)
        writer = pq.ParquetWriter(hashed, DOCUMENT_SCHEMA, compression="zstd")
        for rows in _row_groups(sizes):
            counts = [
                numbers(column[rows], pa.uint64()) for column in (content.starts, content.lengths, content.text_bytes)
            ]
            domains = [domain.encode()] * len(content.ids[rows])
            columns_of_text = [
                _utf8(content.ids[rows]),
                domains,
                _utf8(content.urls[rows]),
                _utf8(content.metadata[rows]),
            ]
            columns = [*counts, *map(strings, columns_of_text)]
            writer.write_batch(pa.record_batch(columns, schema=DOCUMENT_SCHEMA))
        writer.close()
    return hashed.digest.hexdigest()


def _row_groups(sizes: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Neighbouring rows, so many at once as a column of strings can hold. ``sizes``: [rows] characters of each, at most
    4 bytes in UTF-8."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        most = int(np.searchsorted(ends, (ends[first - 1] if first else 0) + _GROUP_CHARACTERS, side="right"))
        last = max(first + 1, min(most, first + _ROW_GROUP))
        yield slice(first, last)
        first = last


def _utf8(texts: list[str]) -> list[bytes]:
    return [text.encode() for text in texts]
