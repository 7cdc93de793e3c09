"""Best-fit packing: what holds for every input, how near it comes to the best, and what a reader then sees."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import TokenSource
from data_pipeline.batches import make_batch
from data_pipeline.errors import UserError
from data_pipeline.inspect import inspect_dataset, render
from data_pipeline.manifest import Manifest, read_manifest
from data_pipeline.packing import best_fit, end_to_end
from data_pipeline.prepare import PrepareSettings, prepare
from data_pipeline.settings import build_settings
from data_pipeline.shard_reading import read_documents, read_tokens
from data_pipeline.testing import tiny_tokenizer
from data_pipeline.verify import verify_dataset

Lengths = st.lists(st.integers(2, 40), max_size=60)


def rows_of(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """The documents of every row, by what the packing says."""
    packing = best_fit(np.array(lengths, np.int64), row_tokens)
    rows: list[list[int]] = [[] for _ in range(packing.tokens // row_tokens)]
    for document, start in zip(packing.order.tolist(), packing.starts.tolist(), strict=True):
        for row in range(start // row_tokens, (start + lengths[document] - 1) // row_tokens + 1):
            rows[row].append(document)
    return rows


@given(Lengths, st.integers(2, 20))
def test_every_packing(lengths: list[int], row_tokens: int) -> None:
    packing = best_fit(np.array(lengths, np.int64), row_tokens)
    order, starts = packing.order.tolist(), packing.starts.tolist()
    assert sorted(order) == list(range(len(lengths))), "every document once"
    ends = [start + lengths[document] for document, start in zip(order, starts, strict=True)]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False)), "none overlaps the next"
    assert packing.tokens % row_tokens == 0
    assert packing.tokens - (ends[-1] if ends else 0) < row_tokens
    for document, start, end in zip(order, starts, ends, strict=True):
        if lengths[document] <= row_tokens:
            assert start // row_tokens == (end - 1) // row_tokens, "cut though it fits into a row"
        else:
            assert start % row_tokens == int(lengths[document] % row_tokens == 1)
    # a token that is no EOS in every row: the last token of a document is its EOS
    text = np.zeros(packing.tokens, bool)
    for start, end in zip(starts, ends, strict=True):
        text[start : end - 1] = True
    assert text.reshape(-1, row_tokens).any(axis=1).all()
    # rows stand in the order of their first document; those that share one stand together
    bins: list[set[int]] = []
    for row in rows_of(lengths, row_tokens):
        if bins and bins[-1] & set(row):
            bins[-1] |= set(row)
        else:
            bins.append(set(row))
    assert [min(one) for one in bins] == sorted(min(one) for one in bins)


def test_worked_examples() -> None:
    assert rows_of([6, 3, 5, 2, 4], 8) == [[0, 3], [1, 2], [4]]
    # 20 = two rows and a tail of 4, into which 3 and nothing else fits best
    assert rows_of([5, 20, 3], 8) == [[0, 2], [1], [1], [1]]
    # the documents of a tail's row follow the tail, whatever their numbers
    packing = best_fit(np.array([4, 20]), 8)
    assert (packing.order.tolist(), packing.starts.tolist(), packing.tokens) == ([1, 0], [0, 20], 24)
    # 17 = two rows and an EOS: one token of filling before it, so that the third row has something to learn
    packing = best_fit(np.array([17]), 8)
    assert (packing.starts.tolist(), packing.tokens) == ([1], 24)
    # a tail of nothing
    assert rows_of([16, 8], 8) == [[0], [0], [1]]
    # equal documents in their own order, equal rooms in the order of opening
    assert rows_of([5, 5, 3, 3], 8) == [[0, 2], [1, 3]]
    assert best_fit(np.array([], np.int64), 8).tokens == 0


def first_fit_decreasing(lengths: list[int], row_tokens: int) -> int:
    """Rows of the textbook's first-fit decreasing, by a plain search."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for row, room in enumerate(rooms):
            if room >= length:
                rooms[row] -= length
                break
        else:
            rooms.append(row_tokens - length)
    return len(rooms)


def best_fit_by_search(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Best-fit decreasing by a plain search over all rows, the first opened of equals."""
    rows: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda document: (-lengths[document], document)):
        rooms = [row_tokens - sum(lengths[member] for member in row) for row in rows]
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= lengths[document]]
        rows[min(fitting)[1]].append(document) if fitting else rows.append([document])
    return sorted(sorted(row) for row in rows)


def fewest_rows(lengths: list[int], row_tokens: int) -> int:
    """The optimum, by trying every order with next fit (which is optimal for some order)."""
    best = len(lengths)
    for order in permutations(lengths):
        rows, room = 1, row_tokens
        for length in order:
            if length > room:
                rows, room = rows + 1, row_tokens
            room -= length
        best = min(best, rows)
    return best


@given(st.lists(st.integers(2, 20), max_size=40))
def test_it_is_best_fit_decreasing(lengths: list[int]) -> None:
    assert rows_of(lengths, 20) == best_fit_by_search(lengths, 20)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=6))
def test_rows_are_at_most_those_of_johnsons_bound(lengths: list[int]) -> None:
    rows = len(rows_of(lengths, 20))
    assert rows <= 11 / 9 * fewest_rows(lengths, 20) + 6 / 9
    assert rows <= first_fit_decreasing(lengths, 20) + 1


def test_waste_on_lengths_like_those_of_text() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 3000).astype(np.int64) + 2, 2048)
    rows = best_fit(lengths, 2048).tokens // 2048
    assert rows <= first_fit_decreasing(lengths.tolist(), 2048)
    assert 1 - lengths.sum() / (rows * 2048) < 0.002


def test_end_to_end() -> None:
    packing = end_to_end(np.array([3, 2, 4]))
    assert (packing.order.tolist(), packing.starts.tolist(), packing.tokens) == ([0, 1, 2], [0, 3, 5], 9)


# ---- through prepare, the reader and the batch ----

ROW = 16


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = np.random.default_rng(3)
    words = "the quick brown fox jumps over the lazy dog".split()  # noqa: SIM905 - a sentence reads better than a list
    made = [" ".join(generator.choice(words, generator.integers(1, 12))) for _ in range(150)]
    return [*made, *(" ".join(generator.choice(words, count)) for count in (60, 90, 200))]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write(folder, texts, shard_tokens=900)
    return folder / "set"


def write(folder: Path, texts: list[str], **changes: Any) -> Manifest:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "given.model").write_bytes(tiny_tokenizer().model)
    plain = {
        "output": str(folder / "set"),
        "tokenizer": {"path": str(folder / "given.model")},
        "sources": {"all": {"kind": "jsonl", "domain": "d", "files": [str(folder / "text.jsonl")]}},
        "heldout_fraction": 0.1,
        "block_tokens": 64,
        "packing": "best_fit",
        "pack_tokens": ROW,
        "processes": 1,
    }
    return prepare(build_settings(PrepareSettings, {**plain, **changes}, "test"))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_read_back_every_document_is_whole_and_no_label_crosses(packed: Path, texts: list[str], split: str) -> None:
    tokenizer = tiny_tokenizer()
    wanted = {tuple(tokenizer.encode(text)) for text in texts}
    source = TokenSource(packed, "d", split, ROW)
    shards = source.manifest.select("d", split)
    assert source.sequences * ROW == source.tokens == int(shards.tokens.sum())
    rows = source.read(np.arange(source.sequences))
    count = np.arange(len(rows))
    batch = make_batch(rows, source.eos_id, 0 * count, count, count)
    mask = batch.loss_mask.numpy()
    tokens, labels, positions = (each.numpy() for each in (batch.tokens, batch.labels, batch.positions))
    assert mask.any(axis=1).all(), "a row without a token to learn"
    # every learnt label follows its token inside one document: chains of them are the documents
    found: list[tuple[int, ...]] = []
    open_document: list[int] = []
    for row in range(len(rows)):
        for at in range(ROW):
            if not mask[row, at]:
                assert tokens[row, at] == source.eos_id
                continue
            if positions[row, at] == 0 and not (at == 0 and open_document):
                assert not open_document
            open_document.append(int(tokens[row, at]))
            if labels[row, at] == source.eos_id:
                found.append(tuple(open_document))
                open_document = []
    assert not open_document
    documents = sum(shard.documents for shard in shards)
    assert len(found) == documents
    assert set(found) <= wanted
    cut = [ids for ids in found if len(ids) + 1 > ROW]
    assert cut, "the test needs a long document"
    assert mask.sum() == sum(map(len, found))
    filling = int(shards.filling.sum())
    assert source.tokens - filling == sum(len(ids) + 1 for ids in found)
    assert (~mask).sum() == documents + filling


def test_the_document_table_names_the_places(packed: Path) -> None:
    manifest = read_manifest(packed)
    tokenizer = tiny_tokenizer()
    whole = 0
    for shard in manifest.shards:
        stream = read_tokens(packed, manifest, shard)
        for row in read_documents(packed, shard).to_pylist():
            ids = stream[row["start"] : row["start"] + row["length"]]
            assert ids[-1] == tokenizer.eos_id
            assert int(tokenizer.piece_bytes[ids].sum()) == row["text_bytes"]
            if row["length"] <= ROW:
                assert row["start"] // ROW == (row["start"] + row["length"] - 1) // ROW
                whole += 1
    assert whole > 30


def test_verify_knows_the_filling(packed: Path) -> None:
    assert verify_dataset(packed, 1) == []


def test_the_waste_is_reported(packed: Path) -> None:
    report = inspect_dataset(packed)
    filling = sum(group["filling"] for group in report["groups"])
    tokens = sum(group["tokens"] for group in report["groups"])
    assert 0 < filling < 0.2 * tokens
    assert f"packing    best fit into rows of 16 tokens; {filling:,} ({filling / tokens:.2%}) are filling" in render(
        report
    )


def test_packing_is_part_of_what_the_data_set_is(packed: Path, texts: list[str], tmp_path: Path) -> None:
    manifest = read_manifest(packed)
    assert manifest.pack_tokens == ROW
    other = write(tmp_path, texts, shard_tokens=900, packing="concat", pack_tokens=None)
    assert other.identity != manifest.identity
    assert int(other.shards.filling.sum()) == 0
    with pytest.raises(UserError, match=r"settings\.packing was 'concat', now it is 'best_fit'"):
        write(tmp_path, texts, shard_tokens=900)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack_tokens": None}, "packing: best_fit needs pack_tokens"),
        ({"pack_tokens": 48}, "pack_tokens 48 does not divide block_tokens 64; the nearest that do are 32 or 64"),
        ({"packing": "concat"}, "pack_tokens = 16 says nothing with packing: concat"),
        ({"packing": "bestfit"}, "did you mean 'best_fit'"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, ["text"], **{"shard_tokens": 900, **changes})
