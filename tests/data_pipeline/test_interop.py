"""Other readers give our tokens back: webdataset, GNU tar and wids; the index files that they are given."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import wids

from data_pipeline.errors import UserError
from data_pipeline.interop import energon_index, write_index
from data_pipeline.layout import shard_path
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.shard_reading import map_blocks
from data_pipeline.testing import write_token_dataset

BLOCK = 64


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, a held-out split, several shards of several blocks; the last block of each is partly filling."""
    random = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        return [random.integers(4, 300, int(random.integers(5, 200))).tolist() for _ in range(count)]

    folder = tmp_path_factory.mktemp("interop") / "dataset"
    groups = {("prose", "train"): documents(30), ("prose", "heldout"): documents(5), ("code", "train"): documents(20)}
    write_token_dataset(folder, groups, block_tokens=BLOCK, documents_per_shard=9)
    return folder


def blocks_of(folder: Path, split: str) -> dict[str, list[int]]:
    """Key of every block of a split -> its tokens, from the reader of our own."""
    manifest = read_manifest(folder)
    return {
        f"{shard.name}-{number:06d}": block.tolist()
        for shard in manifest.shards
        if shard.split == split
        for number, block in enumerate(map_blocks(shard_path(folder, shard.name), manifest.layout, shard.blocks))
    }


def test_webdataset_reads_equal_tokens(dataset: Path) -> None:
    expected = blocks_of(dataset, "train")
    urls = [str(shard_path(dataset, shard.name)) for shard in read_manifest(dataset).select(None, "train")]
    read = [(s["__key__"], s["npy"].tolist()) for s in webdataset.WebDataset(urls, shardshuffle=False).decode()]
    assert read == list(expected.items())


def test_gnu_tar_extracts_equal_tokens(dataset: Path, tmp_path: Path) -> None:
    expected = blocks_of(dataset, "train")
    for shard in read_manifest(dataset).select(None, "train"):
        archive = shard_path(dataset, shard.name)
        listed = subprocess.run(["tar", "--list", "--file", archive], check=True, capture_output=True, text=True)
        assert listed.stderr == ""
        assert listed.stdout.split() == [f"{shard.name}-{number:06d}.npy" for number in range(shard.blocks)]
        subprocess.run(["tar", "--extract", "--file", archive, "--directory", tmp_path], check=True)
    assert {path.stem: np.load(path).tolist() for path in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_wids_reads_equal_tokens(dataset: Path, tmp_path: Path, split: str) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    assert write_index(folder, "wids") == [folder / "wids-train.json", folder / "wids-heldout.json"]
    read = wids.ShardListDataset(
        str(folder / f"wids-{split}.json"),
        cache_dir=str(tmp_path / "cache"),
        transformations=[lambda sample: (sample["__key__"], np.load(sample[".npy"]).tolist())],
        keep=True,
    )
    expected = blocks_of(folder, split)
    assert len(read) == len(expected)
    assert [read[index] for index in range(len(read))] == list(expected.items())


def test_wids_counts_are_those_of_the_archives(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    write_index(folder, "wids")
    described = [shard for split in ("train", "heldout") for shard in _shardlist(folder, split)]
    assert sorted(shard["url"] for shard in described) == [f"shards/{n:06d}.tar" for n in range(len(described))]
    for shard in described:
        with tarfile.open(folder / shard["url"]) as archive:
            assert shard["nsamples"] == len(archive.getmembers())
        assert shard["filesize"] == (folder / shard["url"]).stat().st_size


def test_energon_index_holds_the_offsets_that_tarfile_finds(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    written = write_index(folder, "energon")
    manifest = read_manifest(folder)
    assert [path.name for path in written if path.suffix == ".idx"] == [f"{s.name}.tar.idx" for s in manifest.shards]
    for shard in manifest.shards:
        with tarfile.open(shard_path(folder, shard.name)) as archive:
            offsets = [*(member.offset for member in archive.getmembers()), archive.offset]
        content = (folder / "shards" / f"{shard.name}.tar.idx").read_bytes()
        assert list(struct.unpack(f"<{len(content) // 8}Q", content)) == offsets


def test_energon_index_leaves_our_own_alone(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_index(folder, "energon")
    assert {path: (folder / path).read_bytes() for path in before} == before


def test_energon_metadata_names_every_shard_once(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    write_index(folder, "energon")
    manifest = read_manifest(folder)
    info = json.loads((folder / ".nv-meta/.info.json").read_text())
    assert info == {"shard_counts": {f"shards/{shard.name}.tar": shard.blocks for shard in manifest.shards}}
    parts = json.loads((folder / ".nv-meta/split.yaml").read_text())["split_parts"]
    for part, split in (("train", "train"), ("val", "heldout")):
        assert parts[part] == [f"shards/{shard.name}.tar" for shard in manifest.select(None, split)]


def test_energon_offsets_do_not_wrap_beyond_4_gib(dataset: Path) -> None:
    manifest: Manifest = read_manifest(dataset).model_copy(update={"block_tokens": 65_536})
    offsets = np.frombuffer(energon_index(manifest, 100_000), "<u8")
    stride = manifest.layout.member_stride
    assert stride * 100_000 > 1 << 33
    assert offsets[-1] == stride * 100_000
    assert (np.diff(offsets) == stride).all()


@pytest.mark.parametrize("form", ["energon", "wids"])
def test_written_again_an_index_has_the_same_bytes(dataset: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(dataset, folder)
    first = {path: path.read_bytes() for path in write_index(folder, form)}
    assert {path: path.read_bytes() for path in write_index(folder, form)} == first


def test_unknown_form_is_refused_and_nothing_written(dataset: Path) -> None:
    before = sorted(dataset.rglob("*"))
    with pytest.raises(UserError, match=r"no index form 'parquet'. Ask for one of: energon, wids\."):
        write_index(dataset, "parquet")
    assert sorted(dataset.rglob("*")) == before


def test_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        write_index(tmp_path, "wids")


def test_npy_members_are_plain_npy(dataset: Path) -> None:
    """What is said above about readers holds for anything that knows the format."""
    (name, *_) = read_manifest(dataset).shards.names
    with tarfile.open(shard_path(dataset, name)) as archive:
        member = archive.getmembers()[0]
        content = archive.extractfile(member)
        assert content is not None
        block = np.load(io.BytesIO(content.read()), allow_pickle=False)
    assert block.dtype == np.dtype("<u2")
    assert block.tolist() == blocks_of(dataset, "train")[f"{name}-000000"]


def _shardlist(folder: Path, split: str) -> list[dict[str, object]]:
    shards: list[dict[str, object]] = json.loads((folder / f"wids-{split}.json").read_text())["shardlist"]
    return shards
