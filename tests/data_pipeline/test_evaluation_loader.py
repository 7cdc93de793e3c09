"""Held-out sequences: each once, in order, in equal batches on every rank, with holes at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.loader import EvaluationLoader
from data_pipeline.reader import TokenSource
from data_pipeline.testing import write_token_dataset

SEQ = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    path: Path = tmp_path_factory.mktemp("evaluation") / "data"
    rng = np.random.default_rng(2)
    documents = [rng.integers(3, 300, rng.integers(1, 60)).tolist() for _ in range(9)]
    write_token_dataset(path, {("code", "heldout"): documents}, block_tokens=64, documents_per_shard=4)
    return TokenSource(path, "code", "heldout", SEQ)


@pytest.mark.parametrize("sequences", [None, 1, 7, 10_000])
@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 4), (2, 3), (3, 2), (4, 8)])
def test_an_evaluation_passes_its_sequences_once_in_order_with_equal_batches(
    source: TokenSource, world_size: int, micro_batch: int, sequences: int | None
) -> None:
    count = source.sequences if sequences is None else min(sequences, source.sequences)
    settings: dict[str, Any] = {"world_size": world_size, "micro_batch": micro_batch, "sequences": sequences}
    loaders = [EvaluationLoader(source, rank=rank, source_id=5, **settings) for rank in range(world_size)]
    ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in ranks} == {len(loaders[0])} == {-(-count // (world_size * micro_batch))}
    rows = [torch.cat([ranks[rank][g].sample_ids for rank in range(world_size)]) for g in range(len(ranks[0]))]
    seen = torch.cat(rows).tolist()
    assert seen == [*range(count), *[-1] * (len(seen) - count)]
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == (micro_batch, SEQ)
        assert batch.source_ids.tolist() == [5] * micro_batch
        assert torch.equal(batch.run_positions, batch.sample_ids)
        holes = batch.sample_ids < 0
        assert not batch.loss_mask[holes].any()
        stored = source.read(batch.sample_ids[~holes].numpy())
        assert np.array_equal(batch.tokens[~holes], stored[:, :-1])
        assert np.array_equal(batch.loss_mask[~holes], stored[:, :-1] != source.eos_id)


def test_an_evaluation_can_be_repeated(source: TokenSource) -> None:
    loader = EvaluationLoader(source, rank=0, world_size=1, micro_batch=4)
    first, second = ([batch.sample_ids.tolist() for batch in loader] for _ in range(2))
    assert first == second


def test_a_batch_of_nothing_is_as_one_that_only_fills_up(source: TokenSource) -> None:
    loader = EvaluationLoader(source, rank=3, world_size=4, micro_batch=2, sequences=1, source_id=5)
    (batch,) = loader
    nothing = loader.nothing()
    assert not nothing.loss_mask.any()
    for name in ("rows", "loss_mask", "source_ids", "sample_ids", "run_positions"):
        assert torch.equal(getattr(nothing, name), getattr(batch, name)), name


def test_an_evaluation_of_nothing_is_refused(source: TokenSource) -> None:
    with pytest.raises(UserError, match="an evaluation of 0 sequences measures nothing"):
        EvaluationLoader(source, rank=0, world_size=1, micro_batch=4, sequences=0)
