"""A data set of 10^5 shards and 10^13 tokens that takes a few MB: every shard is a link to one sparse file.

Its manifest is written by the package's own code and is as large as a real one (all hashes are there, and differ); its
shards have their full size of 200 MB, and each block its right CRC32C: the tokens are zeros. So all checks of a start
and of the first batch are those of a real data set.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from crc32c import crc32c

from data_pipeline.layout import INDEX_DTYPE, SHARD_FOLDER, TOKENIZER_FILE, BlockLayout, index_bytes
from data_pipeline.manifest import Manifest, ShardTable, write_manifest
from data_pipeline.testing import tiny_tokenizer

TOKENS_PER_SHARD = 100_000_000
DOMAINS = ("books", "code", "web")
_LAYOUT = BlockLayout(65_536, "uint16")


def make_synthetic(folder: Path, shards: int) -> Path:
    """Write the data set into ``folder``, or take what is there."""
    if (folder / "manifest.json").exists():
        return folder
    (folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)
    blocks = _LAYOUT.blocks(TOKENS_PER_SHARD)
    with open(folder / "zeros.tar", "wb") as archive:
        archive.truncate(_LAYOUT.shard_bytes(blocks))
    index = np.zeros(blocks, INDEX_DTYPE)
    index["offset"] = [_LAYOUT.data_offset(block) for block in range(blocks)]
    index["crc32c"] = crc32c(bytes(_LAYOUT.block_bytes))
    sidecar = index_bytes(index)
    (folder / "zeros.idx").write_bytes(sidecar)
    names = [f"{number:06d}" for number in range(shards)]
    for name in names:
        for kind in ("tar", "idx"):
            link = folder / SHARD_FOLDER / f"{name}.{kind}"
            link.unlink(missing_ok=True)
            os.symlink(f"../zeros.{kind}", link)
    manifest = Manifest(
        block_tokens=_LAYOUT.block_tokens,
        dtype="uint16",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
        tokenizer_sha256=tokenizer.sha256,
        shards=_table(names, blocks, hashlib.sha256(sidecar).digest()),
        sources={},
        settings={},
    )
    write_manifest(folder, manifest)
    return folder


def _table(names: list[str], blocks: int, index_hash: bytes) -> ShardTable:
    n = len(names)
    random = np.random.default_rng(0)
    documents = TOKENS_PER_SHARD // 1000
    counts = {
        "bytes": _LAYOUT.shard_bytes(blocks),
        "blocks": blocks,
        "tokens": TOKENS_PER_SHARD,
        "filling": 0,
        "documents": documents,
        "text_bytes": 4 * TOKENS_PER_SHARD,
    }
    columns = {name: np.full(n, value, np.int64) for name, value in counts.items()}
    columns |= {name: random.integers(0, 256, (n, 32), np.uint8) for name in ("sha256", "docs_sha256")}
    columns["idx_sha256"] = np.tile(np.frombuffer(index_hash, np.uint8), (n, 1))
    columns["first_key"] = np.linspace(0, 2**63, n).astype(np.uint64)
    columns["domain_codes"] = (np.arange(n) * len(DOMAINS) // n).astype(np.int32)
    columns["split_codes"] = np.zeros(n, np.int32)
    return ShardTable(np.array(names, "S6"), DOMAINS, columns)
