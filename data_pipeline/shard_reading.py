"""Whole shards into memory, for the commands that look at or check a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError
from .layout import BlockLayout, documents_path, shard_path
from .manifest import Manifest, Shard


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


def read_tokens(folder: Path, manifest: Manifest, shard: Shard) -> npt.NDArray[np.unsignedinteger]:
    """The valid tokens of a shard: [tokens]."""
    blocks = map_blocks(shard_path(folder, shard.name), manifest.layout, shard.blocks)
    return blocks[:, :-1].reshape(-1)[: shard.tokens]


def read_documents(folder: Path, shard: Shard) -> Any:
    """The document table of a shard (a pyarrow Table of :data:`~data_pipeline.shards.DOCUMENT_SCHEMA`).

    Raises:
        DataError: the file is missing or is not parquet.
    """
    path = documents_path(folder, shard.name)
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the document table {path} can't be read: {error}. Restore it from a copy.") from error
