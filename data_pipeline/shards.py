"""Writing one shard: the archive, its block index and its document table."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from .errors import DataError
from .files import publish, publish_bytes, sha256_file
from .layout import INDEX_DTYPE, BlockLayout, documents_path, index_bytes, index_path, shard_path
from .manifest import Shard

DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("start", pa.uint64()),
        pa.field("length", pa.uint64()),
        pa.field("text_bytes", pa.uint64()),
        pa.field("id", pa.string()),
        pa.field("domain", pa.string()),
        pa.field("url", pa.string()),
    ]
)
"""One row per document: its first token in the shard, its tokens (EOS included), its text's UTF-8 bytes, the hex hash
of its text, its domain, and where it came from."""


@dataclass(frozen=True)
class ShardContent:
    """The documents of one shard, in order.

    Attributes:
        tokens: [tokens] the stream ``doc EOS doc EOS ...`` in the layout's dtype.
        lengths: [documents] tokens of each document, its EOS included.
        text_bytes: [documents] UTF-8 bytes of each document's text.
        ids: hex content hash of each document.
        urls: where each document came from.
    """

    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    ids: list[str]
    urls: list[str]

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """[documents] the first token of each document."""
        starts: npt.NDArray[np.int64] = np.cumsum(self.lengths) - self.lengths
        return starts


def write_shard(
    folder: Path, name: str, domain: str, split: str, layout: BlockLayout, eos_id: int, content: ShardContent
) -> Shard:
    """Publish the three files of shard ``name`` of the data set ``folder`` and return its manifest row.

    Equal content gives equal bytes. The stream is cut into blocks of ``layout.block_tokens``; each block also holds
    the next one's first token, and what the last block lacks is filled with EOS.

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
            member = layout.member_head(name, block) + data + layout.member_tail()
            digest.update(member)
            archive.write(member)
        end = layout.archive_end(blocks)
        digest.update(end)
        archive.write(end)
    sidecar = index_bytes(index)
    publish_bytes(index_path(folder, name), sidecar)
    _write_documents(documents_path(folder, name), domain, content)
    return Shard.model_validate(
        {
            "name": name,
            "domain": domain,
            "split": split,
            "bytes": layout.shard_bytes(blocks),
            "blocks": blocks,
            "tokens": len(content.tokens),
            "documents": len(content.lengths),
            "text_bytes": int(content.text_bytes.sum()),
            "sha256": digest.hexdigest(),
            "idx_sha256": hashlib.sha256(sidecar).hexdigest(),
            "docs_sha256": sha256_file(documents_path(folder, name)),
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
    expected = content.starts + content.lengths - 1
    if not np.array_equal(ends, expected):
        wrong = sorted(set(ends.tolist()) ^ set(expected.tolist()))[0]
        document = int(np.searchsorted(content.starts, wrong, side="right")) - 1
        raise DataError(
            f"shard {name}: document {content.ids[document]} ({content.urls[document]}) has an EOS inside or none at "
            f"its end (token {wrong} of the shard), so its boundary could not be found again. Train another tokenizer."
        )


def _write_documents(path: Path, domain: str, content: ShardContent) -> None:
    columns = [
        content.starts.astype(np.uint64),
        content.lengths.astype(np.uint64),
        content.text_bytes.astype(np.uint64),
        content.ids,
        [domain] * len(content.ids),
        content.urls,
    ]
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, DOCUMENT_SCHEMA, strict=True)],
        schema=DOCUMENT_SCHEMA,
    )
    with publish(path) as handle:
        pq.write_table(table, handle, compression="zstd")
