"""A read that does not come back is told of: which source, which shard, which byte, for how long."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.block_memory import BlockMemory
from data_pipeline.kernel import load
from data_pipeline.layout import shard_path
from data_pipeline.loader import StepLoader
from data_pipeline.order import Order, OrderSource
from data_pipeline.reader import TokenSource
from data_pipeline.testing import write_token_dataset

SEQ = 16


@pytest.fixture
def source(tmp_path: Path) -> TokenSource:
    documents = [np.random.default_rng(n).integers(3, 300, 50).tolist() for n in range(20)]
    write_token_dataset(tmp_path, {("code", "train"): documents}, block_tokens=64)
    return TokenSource(tmp_path, "code", "train", SEQ)


def loader(source: TokenSource, told: list[str], seconds: float) -> StepLoader:
    order = Order(1, [OrderSource("web", source.sequences)])
    return StepLoader(
        order, [source], rank=0, world_size=1, micro_batch=4, plan=BatchPlan(4), seq_len=SEQ, start_step=0,
        start_position=0, end_step=100, prefetch=1, watchdog_seconds=seconds, on_wait=told.append,
    )  # fmt: skip


def test_a_local_file_that_does_not_answer_is_named_again_and_again_but_ever_more_rarely(
    source: TokenSource, tmp_path: Path
) -> None:
    path = shard_path(tmp_path, "000000")
    path.unlink()
    os.mkfifo(path)  # opening it waits for a writer
    told: list[str] = []
    with loader(source, told, 0.1) as steps:
        time.sleep(0.85)
        writer = os.open(path, os.O_WRONLY)
        assert 2 <= len(told) <= 4  # after 0.1, 0.2, 0.4 and 0.8 seconds
        with pytest.raises(OSError, match=r"Illegal seek.*000000\.tar"):
            steps.next_step()
    os.close(writer)
    located = Order(1, [OrderSource("web", source.sequences)]).locate(0, 4)
    first = source.manifest.layout.data_offset(int(located.sequence.min()) // 4)
    message = re.fullmatch(
        r"source 'web' has been waiting for (\S+) s for block (\d+) of shard (\S+), at byte offset (\d+)\. Look .*",
        told[0],
    )
    assert message is not None
    assert 0.1 <= float(message[1]) < 0.3
    assert (message[3], int(message[4])) == (str(path), first)


def test_of_blocks_that_are_read_together_the_one_that_is_waited_for_is_named(
    source: TokenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks sees the same object as long as it is the same read, and another one for the next."""
    kind, seen = type(load()), []
    (kept,) = BlockMemory().lend([source])

    def slow(kernel: Any, descriptor: int, offsets: Any, *rest: Any) -> int:
        for number in range(len(offsets)):
            rest[-1][0] = number
            seen.append((source.reading, source.reading))
        return read(kernel, descriptor, offsets, *rest)

    read = kind.read
    monkeypatch.setattr(kind, "read", slow)
    source.find_or_damage(np.arange(source.sequences)[::-1], kept=kept)
    blocks = source.shards.blocks.tolist()
    assert max(blocks) > 1
    assert [note for note, _ in seen] == [
        (shard, block) for shard in range(len(blocks)) for block in range(blocks[shard])
    ]
    assert all(first is second for first, second in seen)
    assert len({id(note) for note, _ in seen}) == len(seen)
    assert source.reading is None


def test_reads_that_answer_are_never_told_of(source: TokenSource) -> None:
    told: list[str] = []
    with loader(source, told, 0.05) as steps:
        for _ in range(40):
            steps.next_step()
        time.sleep(0.2)  # nothing is being read
    assert told == []


def test_the_thread_ends_with_the_loader(source: TokenSource) -> None:
    before = threading.active_count()
    steps = loader(source, [], 30.0)
    assert {"data-watchdog", "step-loader"} <= {thread.name for thread in threading.enumerate()}
    steps.close()
    assert threading.active_count() == before
