"""Whole shards into memory, for the commands that look at or check a data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .arrow import parquet_table
from .damage import DamagedBlockError
from .errors import DataError
from .layout import BlockLayout, documents_path, shard_path
from .manifest import Manifest, Shard
from .shard_files import LocalShards
from .shard_table import ShardTable


def map_blocks(path: Path, layout: BlockLayout, blocks: int) -> npt.NDArray[np.unsignedinteger]:
    """The tokens of a shard file, mapped, not read: [blocks, block_tokens + 1].

    Raises:
        DataError: the file is missing or shorter than its blocks.
    """
    needed = layout.data_offset(blocks - 1) + layout.block_bytes
    size = path.stat().st_size if path.is_file() else 0
    if size < needed:
        raise DataError(f"shard {path} has {size} bytes; its {blocks} blocks need {needed}. Restore it from a copy.")
    file = np.memmap(path, np.uint8, mode="r")
    strides = (layout.member_stride, layout.token_bytes)
    shape = (blocks, layout.block_tokens + 1)
    return np.ndarray(shape, layout.token_dtype, file, layout.data_offset(0), strides)


def read_tokens(
    folder: Path, manifest: Manifest, shard: Shard, start: int = 0, stop: int | None = None
) -> npt.NDArray[np.unsignedinteger]:
    """The valid tokens ``start`` to ``stop`` (None: the last) of a shard; each block that holds them is checked.

    Raises:
        DataError: the shard is missing or short, a block's CRC32C is not the recorded one, or its index is damaged.
    """
    length = manifest.block_tokens
    stop = shard.tokens if stop is None else stop
    first, last = start // length, -(-stop // length)
    blocks = map_blocks(shard_path(folder, shard.name), manifest.layout, shard.blocks)
    files = LocalShards(folder, ShardTable.of([shard]), manifest.layout)
    try:
        for block in range(first, last):
            files.check(0, block, blocks[block].data.cast("B"))
    except DamagedBlockError as error:
        raise DataError(error.problem) from error
    return blocks[first:last, :-1].reshape(-1)[start - first * length : stop - first * length]


TABLE_ADVICE = "A table of documents can't be rebuilt from its shard: restore it from a copy."


class DamagedTableError(DataError):
    """The document table of a shard is missing or is not the one that was written. ``problem``: what is wrong where."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}. {TABLE_ADVICE}")
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem,)


def documents_of(content: bytes, path: str, sha256: str) -> Any:
    """The document table (a pyarrow Table of :data:`~data_pipeline.shards.DOCUMENT_SCHEMA`) that is the ``content`` of
    the file ``path``, whose SHA-256 the manifest knows.

    Raises:
        DamagedTableError: it is another one. DataError: it can't be read.
    """
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DamagedTableError(
            f"the document table {path} is not the one that was written: its SHA-256 is {found[:12]}, the manifest "
            f"says {sha256[:12]}"
        )
    try:
        return parquet_table(content)
    except pa.ArrowException as error:
        raise DataError(
            f"the document table {path} is as it was written and can't be read: {error}. Install the pyarrow that it "
            "was written with, or a later one."
        ) from error


def read_documents(folder: Path, shard: Shard) -> Any:
    """The document table of a shard.

    Raises:
        DamagedTableError: it is missing or not the one that was written. DataError: it can't be read.
    """
    path = documents_path(folder, shard.name)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DamagedTableError(f"the document table {path} is missing") from error
    except OSError as error:
        raise DataError(
            f"the document table {path} can't be read: {error.strerror or error}. {TABLE_ADVICE}"
        ) from error
    return documents_of(content, str(path), shard.docs_sha256)
