"""Sequences read by arithmetic against the token streams that were written, and every kind of damage refused."""

from __future__ import annotations

import gc
import io
import os
import shutil
import tarfile
import threading
import tracemalloc
from pathlib import Path

import crc32c
import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline import shard_files
from data_pipeline.errors import DataError, UserError
from data_pipeline.files import sha256_file
from data_pipeline.layout import INDEX_DTYPE, index_bytes, index_path, shard_path
from data_pipeline.manifest import read_manifest, write_manifest
from data_pipeline.reader import Place, TokenSource
from data_pipeline.shard_files import ShardFiles
from data_pipeline.testing import write_token_dataset

EOS = 2
BLOCK = 64
SEQ = 16


def make_documents(seed: int, count: int, longest: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, rng.integers(1, longest)).tolist() for _ in range(count)]


DOCUMENTS = {
    ("code", "train"): make_documents(0, 25),
    ("docs", "train"): make_documents(1, 7),
    ("code", "heldout"): make_documents(2, 3),
}
PER_SHARD = 6


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader") / "data"
    write_token_dataset(folder, DOCUMENTS, block_tokens=BLOCK, documents_per_shard=PER_SHARD)
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "data"))


def expected_rows(documents: list[list[int]], seq_len: int = SEQ) -> npt.NDArray[np.int64]:
    """The sequences of one (domain, split), cut from the documents' streams shard by shard."""
    rows = []
    for first in range(0, len(documents), PER_SHARD):
        stream = [token for document in documents[first : first + PER_SHARD] for token in (*document, EOS)]
        sequences = -(-len(stream) // seq_len)
        stream += [EOS] * (sequences * seq_len + 1 - len(stream))
        rows += [stream[q * seq_len : (q + 1) * seq_len + 1] for q in range(sequences)]
    return np.array(rows)


def damage(path: Path, offset: int) -> None:
    with open(path, "r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)
        handle.seek(offset)
        handle.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("seq_len", [1, 16, 32, BLOCK])
@pytest.mark.parametrize(("domain", "split"), list(DOCUMENTS))
def test_every_sequence_is_a_cut_of_the_stream(written: Path, domain: str, split: str, seq_len: int) -> None:
    expected = expected_rows(DOCUMENTS[domain, split], seq_len)
    with TokenSource(written, domain, split, seq_len) as source:
        assert source.sequences == len(expected)
        assert source.eos_id == EOS
        assert source.tokens == sum(len(document) + 1 for document in DOCUMENTS[domain, split])
        rows = source.read(np.arange(source.sequences))
        assert rows.dtype == np.uint16
        assert np.array_equal(rows, expected)


def test_all_domains_together_are_the_shards_in_name_order(written: Path) -> None:
    expected = np.concatenate([expected_rows(DOCUMENTS["code", "train"]), expected_rows(DOCUMENTS["docs", "train"])])
    assert np.array_equal(TokenSource(written, None, "train", SEQ).read(np.arange(len(expected))), expected)


def test_rows_come_in_the_order_asked_for(written: Path) -> None:
    expected = expected_rows(DOCUMENTS["code", "train"])
    source = TokenSource(written, "code", "train", SEQ)
    rng = np.random.default_rng(0)
    for count in (0, 1, 7, 200):
        indices = rng.integers(0, len(expected), count)
        assert np.array_equal(source.read(indices), expected[indices])


def test_results_of_two_reads_share_no_memory(written: Path) -> None:
    source = TokenSource(written, "code", "train", SEQ)
    first = source.read([3, 4])
    kept = first.copy()
    second = source.read([5, 6])
    assert not np.shares_memory(first, second)
    assert np.array_equal(first, kept)


def test_an_index_outside_the_source_is_refused(written: Path) -> None:
    source = TokenSource(written, "code", "train", SEQ)
    for index in (-1, source.sequences):
        with pytest.raises(IndexError, match=f"of a source that has {source.sequences}"):
            source.read([0, index])


def test_place_names_shard_block_and_token(written: Path) -> None:
    source = TokenSource(written, "code", "train", SEQ)
    manifest = read_manifest(written)
    index = -(-manifest.shards[0].tokens // SEQ) + 5
    place = source.place(index)
    assert place == Place(manifest.shards[1].name, 1, 5 * SEQ)
    with tarfile.open(shard_path(written, place.shard)) as archive:
        block = archive.extractfile(archive.getmembers()[place.block])
        assert block is not None
        tokens = np.load(io.BytesIO(block.read()))
    assert np.array_equal(source.read([index])[0], tokens[SEQ : 2 * SEQ + 1])


@pytest.mark.parametrize(("seq_len", "hint"), [(15, "8 or 16"), (100, "64"), (0, "1"), (48, "32 or 64")])
def test_a_length_that_does_not_divide_a_block_is_refused(written: Path, seq_len: int, hint: str) -> None:
    with pytest.raises(UserError, match=rf"seq_len {seq_len} does not divide the blocks of 64 tokens.*Use {hint},"):
        TokenSource(written, "code", "train", seq_len)


def test_unknown_data_is_refused_by_name(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data: the data set has no shard of news/train.*code/train, docs/train"):
        TokenSource(written, "news", "train", SEQ)
    with pytest.raises(UserError, match="no shard of docs/heldout"):
        TokenSource(written, "docs", "heldout", SEQ)
    with pytest.raises(UserError, match="does not exist"):
        TokenSource(tmp_path / "nowhere", "code", "train", SEQ)


def test_a_missing_shard_is_refused_at_open(copied: Path) -> None:
    os.remove(shard_path(copied, "000001"))
    tokens = read_manifest(copied).shards[1].tokens
    with pytest.raises(DataError, match=rf"000001\.tar is missing: the manifest lists it with {tokens} tokens.*verify"):
        TokenSource(copied, "code", "train", SEQ)


@pytest.mark.parametrize("change", [-1, -10_240, 1])
def test_a_shard_of_another_size_is_refused_at_open(copied: Path, change: int) -> None:
    path = shard_path(copied, "000000")
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(DataError, match=rf"000000\.tar has {size + change} bytes where the manifest says {size}"):
        TokenSource(copied, "code", "train", SEQ)


def test_a_flipped_bit_anywhere_in_a_block_is_found_at_its_first_touch(copied: Path) -> None:
    manifest = read_manifest(copied)
    offset = manifest.layout.data_offset(1)
    damage(
        shard_path(copied, "000001"), offset + 2 * BLOCK
    )  # the look-ahead token, which the first sequence never uses
    source = TokenSource(copied, "code", "train", SEQ)
    first = -(-manifest.shards[0].tokens // SEQ)
    whole_blocks = source.read([0, first, first + 3])
    assert np.array_equal(whole_blocks, expected_rows(DOCUMENTS["code", "train"])[[0, first, first + 3]])
    for _ in range(2):
        with pytest.raises(DataError) as refusal:
            source.read([0, first + BLOCK // SEQ])
        message = str(refusal.value)
        assert f"000001.tar, block 1 at byte offset {offset} is damaged: its CRC32C is 0x" in message
        assert "was recorded when it was written" in message
        assert f"Run `pretrain-data verify {copied}`" in message


def test_a_block_is_checked_once_and_blocks_are_touched_in_their_order_on_disk(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    real = ShardFiles.check

    def check(files: ShardFiles, shard: int, block: int, content: memoryview) -> None:
        checked.append(block)
        real(files, shard, block, content)

    monkeypatch.setattr(ShardFiles, "check", check)
    source = TokenSource(copied, "docs", "train", SEQ)
    for _ in range(3):
        source.read(np.arange(source.sequences)[::-1])
    assert checked == [block for shard in source.shards for block in range(shard.blocks)]


def test_a_damaged_or_foreign_index_is_refused(copied: Path) -> None:
    shutil.copy(index_path(copied, "000000"), index_path(copied, "000001"))
    source = TokenSource(copied, "code", "train", SEQ)
    with pytest.raises(DataError, match=r"000001\.idx is not the one the manifest names.*--rebuild-sidecars"):
        source.read(np.arange(source.sequences))
    os.remove(index_path(copied, "000000"))
    with pytest.raises(DataError, match=r"000000\.idx is missing.*--rebuild-sidecars"):
        TokenSource(copied, "code", "train", SEQ).read([0])


def test_a_shard_cut_while_the_run_is_on_is_refused(copied: Path) -> None:
    source = TokenSource(copied, "code", "train", SEQ)
    source.read([0])
    offset = source.manifest.layout.data_offset(0)
    os.truncate(shard_path(copied, "000000"), offset + 7)
    with pytest.raises(DataError, match=rf"ends at byte {offset + 7}, inside block 0 "):
        source.read([0])


def test_open_files_are_bounded_and_threads_may_share_a_source(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "open_files_limit", lambda: 2)
    expected = expected_rows(DOCUMENTS["code", "train"])
    source = TokenSource(written, "code", "train", SEQ)
    assert len(source.shards) == 5
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    failures: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            indices = rng.integers(0, len(expected), 9)
            if not np.array_equal(source.read(indices), expected[indices]):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(os.listdir("/proc/self/fd")) == before + 2
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(source.read([0]), expected[[0]])
    source.close()


def test_sequences_and_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Three sparse shards of 2^33 tokens (17 GB each), of which only the last block holds anything but zeros."""
    small = write_token_dataset(tmp_path, {("web", "train"): [[5]]}, block_tokens=65_536)
    layout, blocks = small.layout, 1 << 17
    last = np.arange(65_537, dtype=np.uint16) % 299
    crcs = np.full(blocks, crc32c.crc32c(bytes(layout.block_bytes)), np.uint32)
    crcs[-1] = crc32c.crc32c(last.tobytes())
    entries = np.empty(blocks, INDEX_DTYPE)
    entries["offset"], entries["crc32c"] = [layout.data_offset(block) for block in range(blocks)], crcs
    shards = []
    for number in range(3):
        name = f"{number:06d}"
        with open(shard_path(tmp_path, name), "wb") as handle:
            handle.truncate(layout.shard_bytes(blocks))
            handle.seek(layout.data_offset(blocks - 1))
            handle.write(last.tobytes())
        index_path(tmp_path, name).write_bytes(index_bytes(entries))
        changes = {
            "name": name,
            "tokens": blocks * 65_536 - 3,
            "blocks": blocks,
            "bytes": layout.shard_bytes(blocks),
            "idx_sha256": sha256_file(index_path(tmp_path, name)),
        }
        shards.append(small.shards[0].model_copy(update=changes))
    write_manifest(tmp_path, small.with_shards(shards))
    with TokenSource(tmp_path, "web", "train", 1) as source:
        assert source.sequences == source.tokens == 3 * (2**33 - 3) > 1 << 34
        assert source.place(source.sequences - 1) == Place("000002", blocks - 1, 2**33 - 4)
        far = np.array([source.sequences - 1, 0, source.sequences - 1000, 2**33 - 3])
        assert source.read(far).tolist() == [last[65_532:65_534].tolist(), [0, 0], last[64_533:64_535].tolist(), [0, 0]]


def test_memory_does_not_grow_with_reading(written: Path) -> None:
    source = TokenSource(written, "code", "train", SEQ)
    indices = np.arange(source.sequences)
    source.read(indices)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(200):
        source.read(indices)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000
