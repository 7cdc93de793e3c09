from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError, UserError
from data_pipeline.manifest import Manifest, load_manifest, read_manifest, write_manifest
from data_pipeline.shard_table import Shard, ShardTable, read_table, table_bytes
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
        return manifest.with_shards([manifest.shards[0].model_copy(update=changes)])

    one_shard, none = with_shard(), "0" * 64
    for same in ({"idx_sha256": none}, {"docs_sha256": none}, {"documents": 9}, {"text_bytes": 9}, {"first_key": 9}):
        assert with_shard(**same).identity == one_shard.identity, same
    others: tuple[dict[str, object], ...] = (
        {"sha256": none}, {"domain": "c"}, {"split": "heldout"}, {"tokens": 9}, {"blocks": 9}, {"name": "000009"},
    )  # fmt: skip
    for other in others:
        assert with_shard(**other).identity != one_shard.identity, other
    assert manifest.with_shards(manifest.shards[:3]).identity != manifest.identity
    unseen = {"settings": {"seed": 1}, "sources": {"x": {}}, "versions": {"headrace": "99"}}
    assert manifest.model_copy(update=unseen).identity == manifest.identity
    for field, value in (("block_tokens", 77), ("vocab_size", 77), ("eos_id", 77), ("tokenizer_sha256", "0")):
        assert manifest.model_copy(update={field: value}).identity != manifest.identity


def test_damage_is_refused(dataset: Path) -> None:
    path = dataset / "manifest.json"
    good = path.read_bytes()
    path.write_bytes(good[:-40])
    with pytest.raises(DataError, match=r"manifest\.json is damaged: it is not valid JSON"):
        read_manifest(dataset)
    path.write_bytes(good.replace(b'"vocab_size": 300', b'"vocab_size": 301', 1))
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
    _edit(dataset, format_version=1)
    with pytest.raises(UserError, match="has format version 1; this version of headrace reads version 2"):
        read_manifest(dataset)


def test_a_missing_manifest_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"folder .*/nowhere does not exist\. Give the folder that `pretrain-data"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no manifest\.json\. .* run it again: it continues"):
        read_manifest(tmp_path)


def test_damage_to_the_shard_table_is_refused(dataset: Path) -> None:
    path = dataset / "shards.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    with pytest.raises(DataError, match=r"shards\.parquet is damaged or belongs to another data set: its SHA-256 is"):
        read_manifest(dataset)
    path.unlink()
    with pytest.raises(DataError, match=r"shards\.parquet is missing: it lists the shards of the data set\. Restore"):
        read_manifest(dataset)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": 0}, "tokens is not above 0"),
        ({"blocks": -1}, "blocks is not above 0"),
        ({"filling": 3}, r"filling is not from 0 to tokens - documents"),
        ({"name": "00000x"}, "name is not six digits"),
        ({"name": "000000"}, "name does not come after the one before"),
    ],
)
def test_rows_that_can_be_no_shards_are_refused(dataset: Path, changes: dict[str, object], problem: str) -> None:
    manifest = read_manifest(dataset)
    rows = list(manifest.shards)
    rows[1] = rows[1].model_copy(update=changes)
    write_manifest(dataset, manifest.with_shards(rows))
    with pytest.raises(DataError, match=rf"does not hold a list of shards: row 1 \(shard '.*'\): {problem}"):
        read_manifest(dataset)


def test_another_parquet_file_is_refused(dataset: Path) -> None:
    for content, problem in (
        (b"no parquet", "it is not a parquet file"),
        (_parquet(pa.table({"name": ["000000"]})), "its columns are not those of a shard table"),
    ):
        (dataset / "shards.parquet").write_bytes(content)
        shards = json.loads((dataset / "manifest.json").read_bytes())["shards"]
        _edit(dataset, shards={**shards, "sha256": hashlib.sha256(content).hexdigest()})
        with pytest.raises(DataError, match=problem):
            read_manifest(dataset)


def _parquet(table: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_a_table_is_a_sequence_of_its_rows(dataset: Path) -> None:
    table = read_manifest(dataset).shards
    rows = list(table)
    assert all(Shard.model_validate(row.model_dump()) == row for row in rows)
    assert ShardTable.of(rows) == table == read_table(table_bytes(table))
    assert [table[-1], *table[1:3]] == [rows[3], rows[1], rows[2]]
    assert [(row.domain, row.split) for row in rows] == [
        ("a", "train"),
        ("a", "train"),
        ("b", "train"),
        ("a", "heldout"),
    ]
    assert rows[0] in table
    assert table[1:] != table[:-1]
    with pytest.raises(IndexError):
        table[4]
    with pytest.raises(ValueError, match="read-only"):
        table.tokens[0] = 5
    assert table[2:3].domains == ("b",)
    assert table.totals()[1] == {
        "domain": "a", "split": "heldout", "shards": 1, "documents": 1, "tokens": 2, "filling": 0, "text_bytes": 1,
        "bytes": 10240,
    }  # fmt: skip


def test_a_manifest_is_read_from_any_storage(dataset: Path) -> None:
    asked: list[str] = []

    def read(name: str) -> bytes:
        asked.append(name)
        return (dataset / name).read_bytes()

    assert load_manifest(read, "far://away") == read_manifest(dataset)
    assert asked == ["manifest.json", "shards.parquet"]
    (dataset / "manifest.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"^far://away/manifest\.json is damaged"):
        load_manifest(read, "far://away")


def synthetic_table(shards: int) -> ShardTable:
    """A table of made-up shards of 10^8 tokens."""
    generator = np.random.default_rng(0)
    names = np.array([f"{number:06d}" for number in range(shards)], "S6")
    columns: dict[str, Any] = {
        "domain_codes": np.sort(generator.integers(0, 20, shards)).astype(np.int32),
        "split_codes": np.zeros(shards, np.int32),
        "first_key": np.sort(generator.integers(0, 1 << 64, shards, np.uint64)),
        "bytes": np.full(shards, 202_000_000),
        "blocks": np.full(shards, 1526),
        "tokens": generator.integers(99_900_000, 100_000_000, shards),
        "filling": np.zeros(shards, np.int64),
        "documents": generator.integers(90_000, 110_000, shards),
        "text_bytes": generator.integers(390_000_000, 400_000_000, shards),
    }
    columns |= {
        name: generator.integers(0, 256, (shards, 32), np.uint8) for name in ("sha256", "idx_sha256", "docs_sha256")
    }
    return ShardTable(names, [f"domain-{code}" for code in range(20)], columns)


def test_a_hundred_thousand_shards_are_read_at_once(dataset: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    write_manifest(many, read_manifest(dataset).model_copy(update={"shards": synthetic_table(100_000)}))
    probe = (
        "import sys, time; from pathlib import Path\n"
        "from data_pipeline.manifest import read_manifest\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) << 10\n"
        "read_manifest(Path(sys.argv[1]))  # loads the libraries\n"
        "before, begin = peak(), time.process_time()\n"
        "manifest = read_manifest(Path(sys.argv[2]))\n"
        "chosen = manifest.select('domain-3', 'train')\n"
        "print(time.process_time() - begin, peak() - before, len(manifest.shards), chosen.tokens.sum())"
    )
    command = [sys.executable, "-c", probe, str(dataset), str(many)]
    seconds, peak, shards, tokens = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(shards) == 100_000
    assert 4e11 < int(tokens) < 6e11
    assert float(seconds) < 0.25
    assert int(peak) < 60e6
