"""megatron-energon reads our shards by the index files we write for it.

It needs some 40 packages, so it lives in the benchmarks' environment, which `python benchmarks/data.py --only interop`
makes; without that environment these tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contest.environments import BENCHMARKS, find_interpreter
from data_pipeline.interop import index_files, write_index
from data_pipeline.layout import shard_path
from data_pipeline.manifest import read_manifest
from data_pipeline.shard_reading import map_blocks
from data_pipeline.testing import write_token_dataset

ENERGON = find_interpreter("peers")

pytestmark = pytest.mark.skipif(
    ENERGON is None, reason="no megatron-energon: `python benchmarks/data.py --only interop` installs it"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        return [random.integers(4, 300, int(random.integers(5, 200))).tolist() for _ in range(count)]

    folder = tmp_path_factory.mktemp("energon") / "dataset"
    groups = {("prose", "train"): documents(30), ("prose", "heldout"): documents(5), ("code", "train"): documents(20)}
    write_token_dataset(folder, groups, block_tokens=64, documents_per_shard=9)
    return folder


@pytest.mark.parametrize(("part", "split"), [("train", "train"), ("val", "heldout")])
def test_energon_reads_equal_tokens_in_order(dataset: Path, part: str, split: str) -> None:
    write_index(dataset, "energon")
    manifest = read_manifest(dataset)
    expected = [
        [f"{shard.name}-{number:06d}", zlib.crc32(block.tobytes())]
        for shard in manifest.select(None, split)
        for number, block in enumerate(map_blocks(shard_path(dataset, shard.name), manifest.layout, shard.blocks))
    ]
    assert _run("-m", "contest.energon_blocks", str(dataset), part) == expected


def test_our_index_is_what_energon_itself_would_write(dataset: Path, tmp_path: Path) -> None:
    manifest = read_manifest(dataset)
    (tmp_path / "shards").mkdir()
    for name in manifest.shards.names:
        (tmp_path / "shards" / f"{name}.tar").symlink_to(shard_path(dataset, name))
    assert ENERGON is not None
    prepare = [ENERGON.with_name("energon"), "prepare", tmp_path, "--non-interactive", "--no-progress"]
    options = ["--split-parts", "train:.*", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]
    subprocess.run([*prepare, *options], check=True, stdout=sys.stderr)
    ours = dict(index_files(manifest, "energon"))
    for name in manifest.shards.names:
        assert ours[f"shards/{name}.tar.idx"] == (tmp_path / "shards" / f"{name}.tar.idx").read_bytes()
    theirs = json.loads((tmp_path / ".nv-meta/.info.json").read_text())["shard_counts"]
    assert json.loads(ours[".nv-meta/.info.json"])["shard_counts"] == theirs
    assert ours[".nv-meta/dataset.yaml"] == (tmp_path / ".nv-meta/dataset.yaml").read_bytes()


def _run(*arguments: str) -> object:
    assert ENERGON is not None
    done = subprocess.run([ENERGON, *arguments], cwd=BENCHMARKS, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)
