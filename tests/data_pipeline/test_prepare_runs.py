"""Runs: many of them need few files, large ones little memory."""

from __future__ import annotations

import os
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.prepare import checked_files
from data_pipeline.prepare.checked_files import publish_rows
from data_pipeline.prepare.runs import DROP_DTYPE, Documents, Run, write_run
from tests.data_pipeline.prepared import make_texts, plain_settings, run


def test_many_runs_need_few_open_files(tmp_path: Path) -> None:
    plain = plain_settings(tmp_path, {"first": ("a", make_texts(200, 1)), "second": ("b", make_texts(100, 2))})
    expected = run(plain, output=str(tmp_path / "few")).identity
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 12, hard))
        found = run(plain, part_bytes=900).identity
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == expected


@pytest.fixture
def large_run(tmp_path: Path) -> Path:
    """200,000 documents of two tokens: a table of 16 MB."""
    count = 200_000
    generator = np.random.default_rng(0)
    documents = Documents(
        keys=generator.integers(0, 1 << 64, count, np.uint64),
        ids=generator.integers(0, 256, (count, 16), np.uint8),
        lengths=np.full(count, 2),
        text_bytes=np.full(count, 1),
        urls=[b"u"] * count,
        metadata=[b""] * count,
        tokens=np.tile(np.array([5, 2], np.uint16), count),
        signatures=np.zeros((count, 0), np.uint32),
    )
    write_run(tmp_path / "run", documents, documents.shuffled(np.arange(count)))
    drops = np.zeros(count // 2, DROP_DTYPE)
    drops["row"] = np.arange(0, count, 2)
    publish_rows(tmp_path / "run.drop", drops)
    return tmp_path / "run"


@pytest.mark.parametrize("deduplicated", [False, True])
def test_a_shard_costs_what_it_holds_not_what_the_run_holds(
    large_run: Path, deduplicated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's first 50,000 documents are another split's; of all the rest every other one is a duplicate."""
    first, last = 50_000, 200_000
    run = Run(str(large_run), first, last, deduplicated)
    keys = np.ascontiguousarray(run.table().rows(first, last)["key"])
    stays = np.arange(first, last) % 2 == 1 if deduplicated else np.ones(last - first, bool)
    checked: list[int] = []
    block_sum = checked_files._block_sum

    def counted(content: memoryview, seed: int, block: int) -> int:
        checked.append(len(content))
        return block_sum(content, seed, block)

    monkeypatch.setattr(checked_files, "_block_sum", counted)
    for k in (2_600, 3_117, 9_999):
        low, high = (k << 64) // 10_000, ((k + 1) << 64) // 10_000
        tracemalloc.start()
        checked.clear()
        found = run.read(low, high, np.dtype("<u2"))
        assert sum(checked) < 60_000, "more was checked than is taken, and its neighbours"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found is not None
        wanted = [key for key, stay in zip(keys.tolist(), stays.tolist(), strict=True) if stay and low <= key < high]
        assert found.keys.tolist() == wanted
        assert found.tokens.tolist() == [5, 2] * len(found)
        assert peak < 100_000, "a part of the run that is not asked for was read"
    cuts = np.array([(k << 64) // 7 for k in range(1, 7)], np.uint64)
    places = np.searchsorted(keys, cuts)
    assert run.tokens_per_range(cuts).tolist() == [2 * int(piece.sum()) for piece in np.split(stays, places)]
