from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.inspect import inspect_dataset, render, sample_documents, unigram_entropy
from data_pipeline.kernel import describe
from data_pipeline.manifest import Manifest
from data_pipeline.testing import tiny_tokenizer, write_token_dataset

DOCUMENTS = {
    ("a", "train"): [[10, 10, 11], [12]],
    ("b", "train"): [[10] * 7],
    ("b", "heldout"): [[10, 13]],
}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_token_dataset(tmp_path, DOCUMENTS, block_tokens=4, documents_per_shard=1)


def test_entropy_is_that_of_the_counts(tmp_path: Path, manifest: Manifest) -> None:
    def entropy(*counts: int) -> float:
        return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)

    # ids 10, 11, 12 and EOS; 14 training tokens, of which b has 7 times id 10 and one EOS
    expected = {"a": entropy(2, 1, 1, 2), "b": entropy(7, 1), "all": entropy(9, 1, 1, 3)}
    found = unigram_entropy(tmp_path, manifest)
    assert found["train"] == pytest.approx(expected)
    cross = -(math.log(10 / 314) + math.log(1 / 314) + math.log(4 / 314)) / 3
    assert found["heldout"] == pytest.approx({"b": cross, "all": cross})


def test_samples_are_decoded_and_evenly_spaced(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"text {i}" for i in range(10)]
    manifest = write_token_dataset(
        tmp_path, {("a", "train"): [tokenizer.encode(text) for text in texts]}, documents_per_shard=3
    )
    found = sample_documents(tmp_path, manifest, 5)
    assert [sample["text"] for sample in found] == texts[::2]
    assert [sample["shard"] for sample in found] == ["000000", "000000", "000001", "000002", "000002"]
    assert found[1]["url"] == "synthetic:a/train/2"
    assert found[1]["tokens"] == len(tokenizer.encode(texts[2])) + 1
    assert len(sample_documents(tmp_path, manifest, 99)) == 10
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer(310).model)
    with pytest.raises(DataError, match=r"tokenizer\.model is not the tokenizer of this data set"):
        sample_documents(tmp_path, manifest, 1)


def test_the_report(tmp_path: Path, manifest: Manifest) -> None:
    def rest(shards: int) -> dict[str, int]:
        return {"filling": 0, "bytes": 10_240 * shards}

    report = inspect_dataset(tmp_path, samples=1, entropy=True)
    assert report["groups"] == [
        {"domain": "a", "split": "train", "shards": 2, "documents": 2, "tokens": 6, "text_bytes": 4, **rest(2)},
        {"domain": "b", "split": "train", "shards": 1, "documents": 1, "tokens": 8, "text_bytes": 7, **rest(1)},
        {"domain": "b", "split": "heldout", "shards": 1, "documents": 1, "tokens": 3, "text_bytes": 2, **rest(1)},
    ]
    text = render(report)
    assert manifest.identity in text
    assert "cross-entropy under all training unigrams" in text
    assert f"kernel     {describe()}" in text
    assert text.count("--- ") == 3

    command = [sys.executable, "-m", "data_pipeline", "inspect", str(tmp_path), "--samples", "1", "--entropy", "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == report


def test_long_names_keep_their_column(tmp_path: Path, manifest: Manifest) -> None:
    report = inspect_dataset(tmp_path)
    name = "a-domain-with-a-very-long-name"
    report["groups"][0]["domain"] = name
    counts = {"records": 2, "documents": 1, "text_bytes": 4, "empty_documents": 1, "rejected": {}}
    report["sources"] = {name: {**counts, "normalised_documents": 1, "inexact_documents": 0}}
    lines = render(report).splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(name)] == [[name, "train"], [name, "1"]]
    kept = lines.index(next(line for line in lines if line.endswith("  kept")))
    assert {len(line) for line in lines[7:11]} == {len(lines[7])}
    assert {line.rindex("  ") for line in lines[kept : kept + 4]} == {lines[kept].rindex("  ")}


def test_what_is_read_is_checked(tmp_path: Path) -> None:
    """A turned bit, a foreign index or table: an error with file, block and remedy, not a wrong number or text."""
    documents = [[20 + i] * 9 for i in range(6)]
    manifest = write_token_dataset(tmp_path, {("a", "train"): documents}, block_tokens=4, documents_per_shard=3)
    archive, index = tmp_path / "shards/000001.tar", tmp_path / "shards/000001.idx"
    table = tmp_path / "shards/000001.docs.parquet"

    def samples() -> object:
        return sample_documents(tmp_path, manifest, 6)

    def entropy() -> object:
        return unigram_entropy(tmp_path, manifest)

    offset = manifest.layout.data_offset(5)
    block = (
        offset,
        rf"shard {archive}, block 5 at byte offset {offset} is damaged: .*`pretrain-data verify {tmp_path}`",
    )
    rebuild = rf"the block index {index} .*`pretrain-data verify --rebuild-sidecars {tmp_path}` to write it again"
    restore = rf"the document table {table} is not the one that was written: .*restore it from a copy\."
    cases = [
        (archive, *block, (samples, entropy)),
        (index, 140, rebuild, (samples, entropy)),
        (table, 9, restore, (samples,)),
    ]
    for path, at, message, readings in cases:
        good = path.read_bytes()
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        for reading in readings:
            with pytest.raises(DataError, match=message) as raised:
                reading()
            assert "on_damage" not in str(raised.value), "that is a setting of runs"
        path.unlink()
        for reading in readings:
            with pytest.raises(DataError, match=str(path)):
                reading()
        path.write_bytes(good)
    assert len(sample_documents(tmp_path, manifest, 6)) == 6


def test_only_the_blocks_of_a_sample_are_read(tmp_path: Path) -> None:
    manifest = write_token_dataset(tmp_path, {("a", "train"): [[20 + i] * 9 for i in range(6)]}, block_tokens=4)
    path = tmp_path / "shards/000000.tar"
    good = sample_documents(tmp_path, manifest, 3)
    content = bytearray(path.read_bytes())
    content[manifest.layout.data_offset(3)] ^= 1  # tokens 12 to 15: of the second document, which is no sample
    path.write_bytes(content)
    assert sample_documents(tmp_path, manifest, 3) == good
    with pytest.raises(DataError, match="block 3 at byte"):
        sample_documents(tmp_path, manifest, 6)
