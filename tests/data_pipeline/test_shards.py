from __future__ import annotations

import hashlib
import io
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from crc32c import crc32c

import data_pipeline.shards
from data_pipeline.errors import DataError
from data_pipeline.layout import (
    INDEX_DTYPE,
    BlockLayout,
    documents_path,
    index_bytes,
    index_path,
    read_index,
    shard_path,
)
from data_pipeline.shards import ShardContent, misplaced_document, write_shard

EOS = 2


def content(documents: list[list[int]], dtype: str = "uint16") -> ShardContent:
    streams = [[*document, EOS] for document in documents]
    lengths = np.array([len(stream) for stream in streams])
    return ShardContent(
        tokens=np.array([token for stream in streams for token in stream], dtype),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        text_bytes=np.array([3 * len(document) for document in documents]),
        ids=[f"{row:032x}" for row in range(len(documents))],
        urls=[f"file#{row}" for row in range(len(documents))],
        metadata=[f'{{"row": {row}}}' if row else "" for row in range(len(documents))],
        first_key=99,
    )


DOCUMENTS = [[10, 11, 12], [], list(range(20, 40)), [13]]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_plain_webdataset_and_gnu_tar_read_a_shard(tmp_path: Path, dtype: str) -> None:
    layout = BlockLayout(8, dtype)
    shard = write_shard(tmp_path, "000007", "code", "train", layout, EOS, content(DOCUMENTS, dtype))
    stream = content(DOCUMENTS).tokens
    expected = np.full((4, 9), EOS)
    for block in range(4):
        piece = stream[block * 8 : block * 8 + 9]
        expected[block, : len(piece)] = piece
    path = shard_path(tmp_path, "000007")

    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"000007-{block:06d}" for block in range(4)]
    assert all(sample["npy"].dtype == dtype for sample in samples)
    np.testing.assert_array_equal([sample["npy"] for sample in samples], expected)

    listing = subprocess.run(["tar", "--list", "--verbose", "-f", path], check=True, capture_output=True, text=True)
    assert listing.stderr == ""
    assert [line.split()[0:2] for line in listing.stdout.splitlines()] == [["-rw-r--r--", "0/0"]] * 4
    for block in range(4):
        name = f"000007-{block:06d}.npy"
        member = subprocess.run(["tar", "-xOf", path, name], check=True, capture_output=True).stdout
        np.testing.assert_array_equal(np.load(io.BytesIO(member)), expected[block])

    assert (shard.blocks, shard.tokens, shard.documents, shard.text_bytes) == (4, 28, 4, 72)
    assert shard.bytes == path.stat().st_size == layout.shard_bytes(4)
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_block_is_one_pread_at_a_computed_offset(tmp_path: Path) -> None:
    layout = BlockLayout(300, "uint16")
    tokens = np.random.default_rng(0).integers(3, 60000, 2000)
    write_shard(tmp_path, "000000", "a", "train", layout, EOS, content([tokens.tolist()]))
    stream = [*tokens, EOS]
    index = read_index(index_path(tmp_path, "000000"))
    assert len(index) == layout.blocks(2001) == 7
    with open(shard_path(tmp_path, "000000"), "rb") as handle:
        for block in range(6):
            assert index["offset"][block] == layout.data_offset(block)
            data = os.pread(handle.fileno(), layout.block_bytes, layout.data_offset(block))
            np.testing.assert_array_equal(np.frombuffer(data, "<u2"), stream[block * 300 : block * 300 + 301])
            assert index["crc32c"][block] == crc32c(data)


def test_the_format_is_pinned(tmp_path: Path) -> None:
    """The bytes of a shard are the identity of data sets that exist: a change needs a new format version."""
    shard = write_shard(tmp_path, "000001", "a", "train", BlockLayout(8, "uint16"), EOS, content(DOCUMENTS))
    assert shard.sha256 == "6e22b098cf4dd25e03ea4507093b2fa6ae2920f90793c9397f6b10a481009a88"
    assert shard.idx_sha256 == "3d2369be66e1442dad4a7229637fcdef13cad357550ffad09403d84b65c088e7"


def test_the_document_table(tmp_path: Path) -> None:
    write_shard(tmp_path, "000000", "code", "train", BlockLayout(8, "uint16"), EOS, content(DOCUMENTS))
    expected = {
        "start": [0, 4, 5, 26],
        "length": [4, 1, 21, 2],
        "text_bytes": [9, 0, 60, 3],
        "id": ["0" * 32, "0" * 31 + "1", "0" * 31 + "2", "0" * 31 + "3"],
        "domain": ["code"] * 4,
        "url": ["file#0", "file#1", "file#2", "file#3"],
        "metadata": ["", '{"row": 1}', '{"row": 2}', '{"row": 3}'],
    }
    assert pq.read_table(documents_path(tmp_path, "000000")).to_pydict() == expected


def test_a_column_of_the_document_table_never_holds_more_than_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A string column ends at 2 GiB; web pages kept as metadata come to more in a shard. Rows and order stay."""
    assert data_pipeline.shards._GROUP_CHARACTERS * 4 < 2**31
    write_shard(tmp_path / "whole", "000000", "d", "train", BlockLayout(8, "uint16"), EOS, LONG)
    monkeypatch.setattr(data_pipeline.shards, "_GROUP_CHARACTERS", 50)
    monkeypatch.setattr(data_pipeline.shards, "_ROW_GROUP", 7)
    write_shard(tmp_path / "cut", "000000", "d", "train", BlockLayout(8, "uint16"), EOS, LONG)
    whole, cut = (pq.ParquetFile(documents_path(tmp_path / name, "000000")) for name in ("whole", "cut"))
    assert cut.read().equals(whole.read())
    groups = [cut.read_row_group(group).to_pylist() for group in range(cut.num_row_groups)]
    assert max(map(len, groups)) == 7
    assert sum(len(group) == 1 for group in groups) >= 1, "a row that is too long for itself stands alone"
    assert all(len(group) == 1 or sum(len(r["url"] + r["metadata"]) for r in group) <= 50 for group in groups)


LONG = replace(
    content([[number] for number in range(3, 40)]),
    metadata=["x" * (number * number % 67 if number > 15 else 0) for number in range(37)],
    urls=["u" * (number % 4) for number in range(37)],
)


def test_eos_inside_a_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"document 0{31}2 \(file#2, tokens 6 to 10 of the shard\) has an EOS inside"):
        write_shard(
            tmp_path, "000000", "a", "train", BlockLayout(8, "uint16"), EOS, content([[5, 6, 7], [8], [9, EOS, 9]])
        )
    assert not (tmp_path / "shards").exists()


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "000000.idx"
    with pytest.raises(DataError, match=r"index .*000000\.idx is missing\. Run `pretrain-data verify --rebuild-sid"):
        read_index(path)
    path.parent.mkdir()
    path.write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(DataError, match=r"index .*000000\.idx can't be read"):
        read_index(path)
    np.save(path.open("wb"), np.zeros(3))
    with pytest.raises(DataError, match="does not hold offsets and CRCs"):
        read_index(path)


def test_a_flip_in_any_byte_of_an_index_header_is_refused(tmp_path: Path) -> None:
    """numpy evaluates the header as Python, which fails in ways of its own."""
    path = tmp_path / "shards" / "000000.idx"
    path.parent.mkdir()
    entries = np.array([(640, 7), (5760, 8)], INDEX_DTYPE)
    content = index_bytes(entries)
    path.write_bytes(content)
    assert read_index(path).tolist() == entries.tolist()
    assert np.load(path).tolist() == entries.tolist()
    for at in range(128):
        for bit in (1, 0x80):
            path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            with pytest.raises(DataError, match=r"000000\.idx does not hold offsets and CRCs\. Run `pretrain-data ver"):
                read_index(path)
    path.write_bytes(content[:-12])
    with pytest.raises(DataError, match="does not hold offsets and CRCs"):
        read_index(path)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"can't be read \(151 bytes are no whole index\)"):
        read_index(path)


@pytest.mark.parametrize(
    ("stream", "starts", "lengths", "wrong"),
    [
        ([5, EOS, 6, 7, EOS], [0, 2], [2, 3], None),
        ([EOS, 5, EOS, EOS, 6, 7, EOS, EOS], [1, 4], [2, 3], None),
        ([], [], [], None),
        ([5, EOS, 9, 6, EOS], [0, 3], [2, 2], 1),  # something in the filling before
        ([5, EOS, 6, EOS, 9, EOS], [0, 2], [2, 2], 1),  # something in the filling at the end
        ([5, EOS, 6, EOS, 7], [0, 2], [2, 3], 1),  # an EOS inside, none at the end
        ([5, 6, 6, EOS], [0, 2], [2, 2], 0),  # no EOS at the end
        ([5, EOS, 6, EOS], [0, 1], [2, 3], 1),  # begins inside the one before
        ([5, EOS, 6, EOS], [0, 2], [2, 3], 1),  # ends behind the stream
        ([5, EOS, EOS], [0, 2], [2, 0], 1),
    ],
)
def test_documents_are_where_their_eos_say(
    stream: list[int], starts: list[int], lengths: list[int], wrong: int | None
) -> None:
    eos = np.flatnonzero(np.array(stream, int) == EOS)
    assert misplaced_document(eos, np.array(starts, int), np.array(lengths, int), len(stream)) == wrong


def test_filling_between_documents_is_counted(tmp_path: Path) -> None:
    packed = replace(
        content([[5], [6]]), tokens=np.array([EOS, 5, EOS, EOS, 6, EOS, EOS, EOS], "uint16"), starts=np.array([1, 4])
    )
    shard = write_shard(tmp_path, "000000", "a", "train", BlockLayout(8, "uint16"), EOS, packed)
    assert (shard.tokens, shard.filling, shard.documents, shard.first_key) == (8, 4, 2, 99)
