from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_pipeline.errors import DataError, UserError
from data_pipeline.manifest import Manifest, read_manifest, write_manifest
from data_pipeline.testing import write_token_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_token_dataset(
        tmp_path,
        {("a", "train"): [[5, 6], [7]], ("b", "train"): [[8]], ("a", "heldout"): [[9]]},
        documents_per_shard=1,
    )
    return tmp_path


def _edit(folder: Path, **changes: object) -> None:
    """Edit manifest.json and give it a fitting checksum, as somebody who knows how could."""
    path = folder / "manifest.json"
    content = {**json.loads(path.read_bytes()), **changes}
    del content["checksum"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "checksum": hashlib.sha256(text.encode()).hexdigest()}))


def test_a_manifest_comes_back(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    before = (dataset / "manifest.json").read_bytes()
    write_manifest(dataset, manifest)
    assert (dataset / "manifest.json").read_bytes() == before
    assert json.loads(before)["identity"] == manifest.identity
    assert manifest.domains == ("a", "b")
    assert [shard.name for shard in manifest.shards] == ["000000", "000001", "000002", "000003"]


def test_select(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    assert [shard.name for shard in manifest.select("a", "train")] == ["000000", "000001"]
    assert [shard.name for shard in manifest.select(None, "train")] == ["000000", "000001", "000002"]
    with pytest.raises(UserError, match=r"no shard of b/heldout\. It holds \(domain/split\): a/heldout, a/train, b/tr"):
        manifest.select("b", "heldout")


def test_identity_covers_content_and_nothing_else(dataset: Path) -> None:
    manifest = read_manifest(dataset)

    def with_shard(**changes: object) -> Manifest:
        return manifest.model_copy(update={"shards": (manifest.shards[0].model_copy(update=changes),)})

    one_shard = with_shard()
    for same in ({"idx_sha256": "0"}, {"docs_sha256": "0"}, {"documents": 9}, {"text_bytes": 9}):
        assert with_shard(**same).identity == one_shard.identity
    for other in ({"sha256": "0"}, {"domain": "c"}, {"split": "heldout"}, {"tokens": 9}, {"name": "000009"}):
        assert with_shard(**other).identity != one_shard.identity
    assert manifest.model_copy(update={"settings": {"seed": 1}, "sources": {"x": {}}}).identity == manifest.identity
    for field, value in (("block_tokens", 77), ("vocab_size", 77), ("eos_id", 77), ("tokenizer_sha256", "0")):
        assert manifest.model_copy(update={field: value}).identity != manifest.identity


def test_damage_is_refused(dataset: Path) -> None:
    path = dataset / "manifest.json"
    good = path.read_bytes()
    path.write_bytes(good[:-40])
    with pytest.raises(DataError, match=r"manifest\.json is damaged: it is not valid JSON"):
        read_manifest(dataset)
    path.write_bytes(good.replace(b'"documents": 1', b'"documents": 2', 1))
    with pytest.raises(DataError, match="its checksum does not fit its content"):
        read_manifest(dataset)
    path.write_bytes(b"[1]")
    with pytest.raises(DataError, match="is not the manifest of a data set"):
        read_manifest(dataset)


def test_a_wrong_root_hash_or_version_is_refused(dataset: Path) -> None:
    good = (dataset / "manifest.json").read_bytes()
    _edit(dataset, vocab_size=299)
    with pytest.raises(DataError, match=r"the root hash [0-9a-f]{64} is not that of its content"):
        read_manifest(dataset)
    (dataset / "manifest.json").write_bytes(good)
    _edit(dataset, format_version=2)
    with pytest.raises(UserError, match="has format version 2; this version of headrace reads version 1"):
        read_manifest(dataset)


def test_a_missing_manifest_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder .*/nowhere does not exist\. Give the folder that `pretrain-data"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no manifest\.json\. .* run it again: it continues"):
        read_manifest(tmp_path)
