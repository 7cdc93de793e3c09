from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.files import sha256_file
from data_pipeline.interop import write_index
from data_pipeline.layout import BlockLayout
from data_pipeline.manifest import read_manifest, write_manifest
from data_pipeline.testing import tiny_tokenizer, write_token_dataset
from data_pipeline.verify import Damage, rebuild_indexes, verify_dataset

LAYOUT = BlockLayout(16, "uint16")
STRIDE = LAYOUT.member_stride
DATA = LAYOUT.data_offset(2)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    documents = [[10, 11, 12] * 5, [13] * 20, [], [14] * 30]
    write_token_dataset(
        tmp_path / "set", {("a", "train"): documents, ("a", "heldout"): [[9]]}, block_tokens=16, documents_per_shard=4
    )
    return tmp_path / "set"


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def damage(folder: Path, file: str, change: Callable[[bytes], bytes]) -> None:
    path = folder / "shards" / file
    path.write_bytes(change(path.read_bytes()))


def test_an_intact_data_set_has_no_damage(dataset: Path) -> None:
    assert verify_dataset(dataset, 1) == verify_dataset(dataset, 2) == []


SIZE = 10_240
ENDS = "the file ends inside this block: it has {} bytes, the manifest says 10240"
END = "the end of the archive is not as written"


@pytest.mark.parametrize(
    ("change", "problem", "block", "offset"),
    [
        (flip(DATA + 7), "CRC32C does not fit", 2, DATA),
        (flip(2 * STRIDE + 150), "damaged tar or npy header", 2, 2 * STRIDE + 150),
        (flip(2 * STRIDE + 512 + 30), "damaged tar or npy header", 2, 2 * STRIDE + 542),
        (flip(DATA + LAYOUT.block_bytes + 3), "padding is not zero", 2, DATA + LAYOUT.block_bytes + 3),
        (flip(5 * STRIDE + 600), END, None, 5 * STRIDE + 600),
        (lambda content: content[:DATA], ENDS.format(DATA), 2, DATA),
        (lambda content: content[: 2 * STRIDE], ENDS.format(2 * STRIDE), 2, 2 * STRIDE),
        (lambda content: content[:-1], f"{END}: it has 10239 bytes, the manifest says 10240", None, SIZE - 1),
        (lambda content: content + b"\0", f"{END}: it has 10241 bytes, the manifest says 10240", None, SIZE),
        (flip(DATA + 2 * 16), "CRC32C does not fit", 2, DATA),
        (
            lambda content: content[: DATA - 9] + bytes(29) + content[DATA + 20 :],
            "damaged tar or npy header; CRC32C does not fit",
            2,
            DATA - 9,
        ),
        (lambda content: b"", ENDS.format(0), 0, 0),
    ],
)
def test_damage_to_an_archive_is_one_problem_at_its_place(
    dataset: Path, change: Callable[[bytes], bytes], problem: str, block: int | None, offset: int
) -> None:
    """Neither the SHA-256 of the file, nor strange tokens, nor the table of documents is told beside its cause."""
    assert (dataset / "shards" / "000000.tar").stat().st_size == SIZE
    damage(dataset, "000000.tar", change)
    assert verify_dataset(dataset, 1) == [Damage("shards/000000.tar", problem, "000000", block, offset)]


def test_damage_that_only_the_missing_block_index_could_place_is_told(dataset: Path) -> None:
    (dataset / "shards" / "000000.idx").unlink()
    damage(dataset, "000000.tar", lambda content: content[: DATA + 7] + b"\2" + content[DATA + 8 :])
    index, archive = verify_dataset(dataset, 1)
    assert index.file == "shards/000000.idx"
    beyond = "token 525 is beyond the vocabulary of 300"
    assert archive == Damage("shards/000000.tar", beyond, "000000", 2, DATA + 6), "what gives the block away"
    damage(dataset, "000000.tar", lambda content: content[: DATA + 7] + b"\1" + content[DATA + 8 :])
    _, archive = verify_dataset(dataset, 1)
    assert (archive.block, archive.offset) == (None, None)
    assert archive.problem.endswith("in tokens of a block that can't be told without the block index")


def test_what_belongs_to_another_shard_is_named(dataset: Path) -> None:
    folder = dataset / "shards"
    one, other = folder / "000000.tar", folder / "000001.tar"
    good = one.read_bytes()
    shutil.copy(other, one)
    assert [str(item) for item in verify_dataset(dataset, 1)] == [
        "shards/000000.tar: this is the content of shards/000001.tar (same SHA-256)"
    ]
    other.write_bytes(good)
    assert [str(item) for item in verify_dataset(dataset, 2)] == [
        "shards/000000.tar: this is the content of shards/000001.tar (same SHA-256)",
        "shards/000001.tar: this is the content of shards/000000.tar (same SHA-256)",
    ]
    shutil.copy(one, other)
    one.write_bytes(good)
    for kind in ("idx", "docs.parquet"):
        shutil.copy(folder / f"000001.{kind}", folder / f"000000.{kind}")
    assert [str(item) for item in verify_dataset(dataset, 1)] == [
        f"shards/000000.{kind}: this is the content of shards/000001.{kind} (same SHA-256)"
        for kind in ("idx", "docs.parquet")
    ]


def test_all_damage_is_reported(dataset: Path) -> None:
    damage(dataset, "000000.tar", flip(DATA))
    damage(dataset, "000001.docs.parquet", flip(10))
    (dataset / "shards" / "000000.idx").unlink()
    (dataset / "shards" / "000009.tar").touch()
    (dataset / "tokenizer.model").write_bytes(tiny_tokenizer(310).model)
    found = [str(item) for item in verify_dataset(dataset, 1)]
    assert "tokenizer.model: is not the tokenizer the shards were written with" in found
    assert "shards/000009.tar: is not in the manifest" in found
    assert "shards/000000.idx: missing (`verify --rebuild-sidecars` writes it again)" in found
    assert any(item.startswith("shards/000000.tar") for item in found)
    assert any(item.startswith("shards/000001.docs.parquet: SHA-256 is") for item in found)


@pytest.mark.parametrize("at", [0, 9, 20, 40, 100])
def test_a_damaged_index_header_is_reported(dataset: Path, at: int) -> None:
    damage(dataset, "000000.idx", flip(at))
    (found,) = verify_dataset(dataset, 1)
    assert found.file == "shards/000000.idx"
    assert found.problem.startswith("SHA-256 is ")


def test_a_missing_shard_is_reported(dataset: Path) -> None:
    for path in (dataset / "shards").glob("000001.*"):
        path.unlink()
    found = {(item.file, item.problem) for item in verify_dataset(dataset, 1)}
    assert {file for file, _ in found} == {f"shards/000001.{kind}" for kind in ("tar", "idx", "docs.parquet")}
    assert ("shards/000001.tar", "missing") in found


def test_a_missing_archive_does_not_make_its_table_look_damaged(dataset: Path) -> None:
    (dataset / "shards" / "000001.tar").unlink()
    assert [str(item) for item in verify_dataset(dataset, 1)] == ["shards/000001.tar: missing"]


@pytest.mark.parametrize("form", ["energon", "wids"])
def test_index_files_for_other_readers_are_known_and_held_against_the_manifest(dataset: Path, form: str) -> None:
    written = write_index(dataset, form)
    assert verify_dataset(dataset, 1) == []
    for path in written:
        good = path.read_bytes()
        for bad in (flip(len(good) // 2)(good), good[:-1], b""):
            path.write_bytes(bad)
            (found,) = verify_dataset(dataset, 1)
            assert found.file == path.relative_to(dataset).as_posix()
            advice = f"`pretrain-data index --form {form}` writes it again"
            assert found.problem == f"is not the index that fits the manifest ({advice})"
        path.write_bytes(good)
    assert verify_dataset(dataset, 1) == []


def test_an_index_of_a_shard_that_the_manifest_does_not_name_is_reported(dataset: Path) -> None:
    write_index(dataset, "energon")
    (dataset / "shards" / "000009.tar.idx").touch()
    assert [str(found) for found in verify_dataset(dataset, 1)] == ["shards/000009.tar.idx: is not in the manifest"]


def _forge(dataset: Path, at_block: int, at_token: int, token: int) -> list[Damage]:
    """Change a token and mend every hash over it, as a faulty writer would have left it."""
    offset = LAYOUT.data_offset(at_block) + 2 * at_token
    damage(
        dataset,
        "000000.tar",
        lambda content: content[:offset] + bytes([token & 255, token >> 8]) + content[offset + 2 :],
    )
    manifest = read_manifest(dataset)
    archive = sha256_file(dataset / "shards" / "000000.tar")
    mended = manifest.shards[0].model_copy(update={"sha256": archive, "idx_sha256": "0" * 64})
    write_manifest(dataset, manifest.with_shards([mended, *manifest.shards[1:]]))
    assert rebuild_indexes(dataset) == ["000000"]
    index = sha256_file(dataset / "shards" / "000000.idx")
    shards = [mended.model_copy(update={"idx_sha256": index}), *manifest.shards[1:]]
    write_manifest(dataset, manifest.with_shards(shards))
    return verify_dataset(dataset, 1)


def test_tokens_are_held_against_the_format(dataset: Path) -> None:
    """What no hash shows: the 69 tokens lie in blocks 0 to 4, the last of which is filled from token 5 on."""
    copies = [shutil.copytree(dataset, dataset.parent / f"copy{i}") for i in range(4)]
    (look_ahead,) = _forge(copies[0], 1, 16, 15)
    assert look_ahead.problem == "begins with token 13; the block before looks ahead to 15"
    assert (look_ahead.block, look_ahead.offset) == (2, LAYOUT.data_offset(2))
    (beyond,) = _forge(copies[1], 1, 7, 300)
    assert beyond.problem == "token 300 is beyond the vocabulary of 300"
    assert (beyond.block, beyond.offset) == (1, LAYOUT.data_offset(1) + 14)
    (filling,) = _forge(copies[2], 4, 9, 15)
    assert (filling.problem, filling.block, filling.offset) == ("the filling is not EOS", 4, LAYOUT.data_offset(4) + 18)
    (eos,) = _forge(copies[3], 1, 7, 2)
    assert eos.problem == "row 1 says tokens 16 to 37, which the EOS of the shard do not"


def test_the_document_table_is_held_against_the_shard(dataset: Path) -> None:
    """Here, too, every hash is mended, as by a faulty writer; a table with another hash is not looked into."""
    path = dataset / "shards" / "000000.docs.parquet"
    table = pq.read_table(path)
    manifest = read_manifest(dataset)
    starts = table["start"].to_numpy() + np.array([0, 0, 1, 0], np.uint64)
    for changed, problem in (
        (table.set_column(0, "start", [starts]), "row 2 says tokens 38 to 39, which the EOS of the shard do not"),
        (table.slice(0, 3), "has 3 rows, the manifest says 4 documents"),
        (table.set_column(4, "domain", [["b"] * 4]), "a row is not of domain a"),
        (table.set_column(2, "text_bytes", [np.zeros(4, np.uint64)]), "its text_bytes add up to 0, the manifest says "),
    ):
        pq.write_table(changed, path)
        (strange,) = verify_dataset(dataset, 1)
        assert strange.problem.startswith("SHA-256 is ")
        mended = manifest.shards[0].model_copy(update={"docs_sha256": sha256_file(path)})
        write_manifest(dataset, manifest.with_shards([mended, *manifest.shards[1:]]))
        (found,) = verify_dataset(dataset, 1)
        assert found.file == "shards/000000.docs.parquet"
        assert found.problem.startswith(problem)
        write_manifest(dataset, manifest)


def test_block_indexes_are_rebuilt_from_the_archives(dataset: Path) -> None:
    before = {path: path.read_bytes() for path in (dataset / "shards").glob("*.idx")}
    (dataset / "shards" / "000000.idx").unlink()
    damage(dataset, "000001.idx", flip(139))
    assert rebuild_indexes(dataset) == ["000000", "000001"]
    assert {path: path.read_bytes() for path in before} == before
    assert rebuild_indexes(dataset) == []
    (dataset / "shards" / "000000.idx").unlink()
    damage(dataset, "000000.tar", flip(DATA))
    with pytest.raises(DataError, match=r"000000\.idx can't be rebuilt: .*000000\.tar is missing or damaged"):
        rebuild_indexes(dataset)


def test_a_shard_with_another_tar_header_is_no_longer_the_data_set(dataset: Path) -> None:
    """GNU tar can pack the same members again; the stride breaks, and verify says so instead of reading on."""
    path = dataset / "shards" / "000000.tar"
    unpacked = dataset.parent / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", path, "-C", unpacked], check=True)
    subprocess.run(["tar", "-cf", path, "-C", unpacked, "."], check=True)
    assert any(
        item.problem.startswith("damaged tar or npy header") and item.block == 0 for item in verify_dataset(dataset, 1)
    )


def test_a_data_set_without_its_shards_is_reported(dataset: Path) -> None:
    shutil.rmtree(dataset / "shards")
    found = [str(damage) for damage in verify_dataset(dataset, 1)]
    assert "shards/000000.tar: missing" in found
    assert len(found) == 3 * len(read_manifest(dataset).shards)


def test_a_file_that_can_not_be_read_is_reported_and_the_rest_is_looked_at(dataset: Path) -> None:
    """A disk that fails: this file of Linux's can be opened, and not read."""
    path = dataset / "shards" / "000000.tar"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    (dataset / "shards" / "000001.tar").unlink()
    found = [str(damage) for damage in verify_dataset(dataset, 1)]
    assert "shards/000000.tar: can't be read to its end: Input/output error" in found
    assert "shards/000001.tar: missing" in found
