"""Batches against a plain loop over tokens; documents kept apart; holes."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches import Batch, BatchMaker, make_batch
from data_pipeline.kernel import load
from data_pipeline.recycled import Recycled
from data_pipeline.rows import Rows

EOS = 2


def batch_of(rows: list[list[int]] | npt.NDArray[np.uint16], sample_ids: list[int] | None = None) -> Batch:
    tokens = np.array(rows, np.uint16)
    ids = np.arange(len(tokens)) if sample_ids is None else np.array(sample_ids)
    return make_batch(tokens, EOS, np.zeros(len(tokens), np.int64), ids, ids + 100)


def reference_row(row: list[int]) -> tuple[list[bool], list[int], list[int]]:
    """Loss mask, positions and document ids of one row, token by token."""
    mask, positions, documents = [], [], []
    position = document = 0
    for token in row[:-1]:
        mask.append(token != EOS)
        positions.append(position)
        documents.append(document)
        position += 1
        if token == EOS:
            position, document = 0, document + 1
    return mask, positions, documents


rows_of_tokens = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([EOS, 5, 6, 7]), min_size=length + 1, max_size=length + 1), min_size=1, max_size=5
    )
)


@settings(max_examples=300, deadline=None)
@given(rows=rows_of_tokens)
def test_a_batch_is_what_a_loop_over_its_tokens_gives(rows: list[list[int]]) -> None:
    batch = batch_of(rows)
    assert batch.tokens.tolist() == [row[:-1] for row in rows]
    assert batch.labels.tolist() == [row[1:] for row in rows]
    masks, positions, documents = zip(*(reference_row(row) for row in rows), strict=True)
    assert batch.loss_mask.tolist() == list(masks)
    assert batch.positions.tolist() == list(positions)
    assert batch.document_ids.tolist() == list(documents)
    assert batch.single_document == all(document[-1] == 0 for document in documents)
    assert batch.document_ends.tolist() == np.flatnonzero(~np.array(masks).reshape(-1)).tolist()
    assert batch.label_counts.tolist() == [sum(mask) for mask in masks]


@settings(max_examples=200, deadline=None)
@given(
    rows=rows_of_tokens.filter(lambda rows: len(rows) > 1),
    repeats=st.integers(1, 6),
    together=st.integers(1, 3),
    holes=st.sets(st.integers(0, 29)),
)
def test_batches_made_together_are_those_made_one_by_one(
    rows: list[list[int]], repeats: int, together: int, holes: set[int]
) -> None:
    size = len(rows)
    tokens = np.tile(np.array(rows, np.uint16), (repeats * together, 1))
    tokens = np.random.default_rng(0).permutation(tokens)
    count = len(tokens)
    ids = np.arange(count) + 7
    ids[[row for row in holes if row < count]] = -1
    sources, positions = np.arange(count) % 3, np.arange(count) + 100
    widen = load().widen(Rows.of(tokens), EOS, ids, size)
    maker = BatchMaker(widen, EOS, sources, ids, positions, size)
    memory = Recycled((size, tokens.shape[1]))
    made = [maker.make(number, memory.take()) for number in range(repeats * together)]
    for number, batch in enumerate(made):
        part = slice(number * size, (number + 1) * size)
        alone = make_batch(tokens[part], EOS, sources[part], ids[part], positions[part])
        for name in ("rows", "tokens", "labels", "ids", "source_ids", "sample_ids", "run_positions", "label_counts"):
            assert torch.equal(getattr(batch, name), getattr(alone, name)), name
        assert batch.document_ends.tolist() == alone.document_ends.tolist()
        inside = [EOS in row[:-2] for row in tokens[part].tolist()]
        assert batch.single_document == (not any(i and k >= 0 for i, k in zip(inside, ids[part], strict=True)))


def test_a_hand_written_row() -> None:
    batch = batch_of([[5, 6, EOS, 7, EOS, EOS, EOS]])
    assert batch.labels.tolist() == [[6, EOS, 7, EOS, EOS, EOS]]
    assert batch.loss_mask.tolist() == [[True, True, False, True, False, False]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2]]


def test_no_label_that_counts_crosses_a_document_and_every_token_but_the_first_of_a_document_is_a_label() -> None:
    rng = np.random.default_rng(0)
    stream = np.concatenate([[*rng.integers(3, 300, rng.integers(1, 20)), EOS] for _ in range(200)])
    length = 16
    count = (len(stream) - 1) // length
    batch = batch_of(np.stack([stream[i * length : (i + 1) * length + 1] for i in range(count)]))
    document = np.cumsum(np.concatenate([[0], stream[:-1] == EOS]))
    inside = document[: count * length] == document[1 : count * length + 1]
    assert np.array_equal(batch.loss_mask.numpy().reshape(-1), inside)


def test_dtypes_shapes_and_ids() -> None:
    rows = np.full((3, 9), 7, np.uint32)
    batch = make_batch(rows, EOS, np.array([0, 4, 4]), np.array([11, 12, 1 << 40]), np.array([5, 6, 1 << 41]))
    for name in ("tokens", "labels", "positions"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32
    assert batch.loss_mask.dtype == torch.bool
    for name in ("tokens", "labels", "loss_mask", "positions", "document_ids"):
        assert getattr(batch, name).shape == (3, 8)
    assert batch.rows.is_contiguous()
    assert batch.label_counts.dtype == torch.int64
    assert batch.document_ends.dtype == np.int32
    assert batch.source_ids.tolist() == [0, 4, 4]
    assert batch.sample_ids.tolist() == [11, 12, 1 << 40]
    assert batch.run_positions.tolist() == [5, 6, 1 << 41]


def test_token_ids_above_16_bits_are_kept() -> None:
    rows = np.array([[70_000, 1 << 31, (1 << 32) - 1]], np.uint32)
    assert make_batch(
        rows, EOS, np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    ).labels.tolist() == [[1 << 31, (1 << 32) - 1]]


def test_a_boundary_is_inside_only_when_a_token_follows_it() -> None:
    assert batch_of([[5, 6, 7, EOS]]).single_document  # the EOS is only a label
    assert batch_of([[5, 6, EOS, 7]]).single_document  # the EOS is the last token: nothing of the next document is seen
    assert not batch_of([[5, EOS, 7, 7]]).single_document
    assert not batch_of([[5, 6, 7, 7], [EOS, 5, 6, 7]]).single_document


def test_a_hole_counts_for_nothing() -> None:
    batch = batch_of([[5, 6, 7, 7], [5, 6, 7, 7]], sample_ids=[3, -1])
    assert batch.tokens.tolist() == [[5, 6, 7], [EOS, EOS, EOS]]
    assert batch.labels.tolist() == [[6, 7, 7], [EOS, EOS, EOS]]
    assert batch.loss_mask.tolist() == [[True, True, True], [False, False, False]]
    assert batch.label_counts.tolist() == [3, 0]
    assert batch.document_ends.tolist() == [3, 4, 5]
    assert batch.single_document


def test_no_tensor_shares_memory_with_what_it_was_made_from() -> None:
    rows, ids = np.full((2, 5), 7, np.uint16), np.zeros(2, np.int64)
    batch = make_batch(rows, EOS, ids, ids, ids)
    before = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    before = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    rows[:], ids[:] = EOS, 9
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())
    tensors = [getattr(batch, name) for name in before]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_a_batch_crosses_to_the_device_as_its_rows_and_ids_and_makes_the_rest_there() -> None:
    batch = batch_of([[5, EOS, 7, 7]])
    assert batch.positions.tolist() == [[0, 1, 0]]
    moved = batch.to("meta")
    tensors = [getattr(moved, field.name) for field in dataclasses.fields(moved)]
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    assert [tensor.shape for tensor in tensors] == [(1, 4), (3, 1)]
    made = [moved.tokens, moved.labels, moved.loss_mask, moved.positions, moved.document_ids, moved.label_counts]
    assert all(tensor.device.type == "meta" for tensor in tensors + made)
    assert moved.single_document is False
    assert moved.document_ends.tolist() == [1]


def test_what_is_computed_is_computed_once() -> None:
    batch = batch_of([[5, EOS, 7, 7]])
    for name in ("tokens", "labels", "loss_mask", "positions", "document_ids", "label_counts"):
        assert getattr(batch, name) is getattr(batch, name)
    for one in (batch, batch.to("cpu")):
        assert one.tokens.data_ptr() == one.rows.data_ptr()
        assert one.labels.data_ptr() == one.rows.data_ptr() + one.rows.itemsize


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_batches_are_page_locked_and_equal() -> None:
    batch = batch_of([[5, EOS, 7, 7]])
    assert batch.pin_memory().rows.is_pinned()
    assert torch.equal(batch.pin_memory().to("cuda").positions.cpu(), batch.positions)


def test_speed() -> None:
    """Measured at 1800 million tokens a second on one core."""
    rows = np.random.default_rng(0).integers(0, 300, (16, 4097)).astype(np.uint16)
    ids = np.arange(16)
    best = 1e9
    for _ in range(10):
        began = time.perf_counter()
        make_batch(rows, EOS, ids, ids, ids)
        best = min(best, time.perf_counter() - began)
    assert 16 * 4096 / best > 200e6
