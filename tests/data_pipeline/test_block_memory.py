"""What is kept in memory changes nothing but the number of reads; batches share nothing; files change under a run."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import ahead, step_reader
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.block_memory import BlockMemory
from data_pipeline.errors import DataError
from data_pipeline.kernel import load
from data_pipeline.layout import shard_path
from data_pipeline.loader import StepLoader
from data_pipeline.order import Order, OrderSource
from data_pipeline.reader import TokenSource
from data_pipeline.shard_files import LocalShards, OpenFile, ShardFiles
from data_pipeline.step_reader import Step
from data_pipeline.testing import write_token_dataset
from data_pipeline.windowed import Windows

from .kernels import KINDS, using

SEQ = 16
PLACE = {64: 192, 128: 320}
"""Bytes that a block takes by its tokens: 2 a token and the look-ahead, up to whole cache lines."""
NAMES = ("code", "docs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two data sets of blocks of different length."""
    made = []
    for seed, (name, block) in enumerate(zip(NAMES, PLACE, strict=True)):
        rng = np.random.default_rng(seed)
        folder = tmp_path_factory.mktemp("memory") / name
        documents = [rng.integers(3, 300, rng.integers(1, 60)).tolist() for _ in range(90)]
        write_token_dataset(folder, {("web", "train"): documents}, block_tokens=block, documents_per_shard=30)
        made.append(folder)
    return made


@pytest.fixture
def copied(folders: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[0], tmp_path / "data"))


@pytest.fixture(params=KINDS)
def either_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        yield from using(request.param, patched)


def sources_of(folders: list[Path]) -> list[TokenSource]:
    return [TokenSource(folder, "web", "train", SEQ) for folder in folders]


def order_of(sources: list[TokenSource], windowed: bool = False) -> Order:
    named = [OrderSource(name, source.sequences) for name, source in zip(NAMES, sources, strict=False)]
    return Order(5, named, mode="windowed", windows=Windows(2, 16)) if windowed else Order(5, named)


def loader_of(order: Order, sources: list[TokenSource], **changes: Any) -> StepLoader:
    settings: dict[str, Any] = {
        "rank": 0, "world_size": 1, "micro_batch": 4, "plan": BatchPlan(8), "seq_len": SEQ, "start_step": 0,
        "start_position": 0, "end_step": 120, "prefetch": 0,
    }  # fmt: skip
    return StepLoader(order, sources, **{**settings, **changes})


def tokens_of(order: Order, sources: list[TokenSource], steps: int) -> list[list[list[int]]]:
    """The rows of each step, sequence by sequence from sources that keep nothing."""
    located = order.locate(0, steps * 8)
    rows = [
        sources[number].read([sequence])[0].tolist()
        for number, sequence in zip(located.source.tolist(), located.sequence.tolist(), strict=True)
    ]
    return [rows[first : first + 8] for first in range(0, len(rows), 8)]


def rows_of(step: Step) -> list[list[int]]:
    rows: list[list[int]] = torch.cat([batch.rows for batch in step.micro_batches]).tolist()
    return rows


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("places", [0, 1, 2, 7, 1000])
def test_steps_are_the_same_whatever_is_kept(folders: list[Path], places: int, both: bool, windowed: bool) -> None:
    """Fewer places than a step wants blocks, so that wanted blocks contend for one; and more than there are blocks."""
    folders = folders if both else folders[:1]
    sources = sources_of(folders)
    order = order_of(sources, windowed)
    memory = BlockMemory(places * PLACE[128 if both else 64])
    with loader_of(order, sources, memory=memory) as loader:
        found = [rows_of(step) for step in loader]
    assert found == tokens_of(order, sources_of(folders), 120)


def reads_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the blocks and single sequences that are read from now on, and the checks."""
    counts = {"blocks": 0, "rows": 0, "checks": 0}
    kind, by_itself, check = type(load()), OpenFile.read, ShardFiles.check
    together = kind.read

    def counting(kernel: Any, descriptor: int, offsets: Any, *rest: Any) -> int:
        right = together(kernel, descriptor, offsets, *rest)
        assert right == len(offsets)
        counts["rows" if rest[2] == 2 * (SEQ + 1) else "blocks"] += right
        counts["checks"] += 0 if rest[3] is None else right
        return right

    def counting_one(file: OpenFile, into: memoryview, offset: int) -> int:
        counts["blocks"] += 1
        return by_itself(file, into, offset)

    def checking(files: ShardFiles, shard: int, block: int, content: memoryview) -> None:
        counts["checks"] += 1
        check(files, shard, block, content)

    monkeypatch.setattr(kind, "read", counting)
    monkeypatch.setattr(OpenFile, "read", counting_one)
    monkeypatch.setattr(ShardFiles, "check", checking)
    return counts


def read_kept(source: TokenSource, memory: BlockMemory, kept: Any, indices: list[int]) -> tuple[Any, Any]:
    """The sequences, EOS where they are damaged, and what is wrong, as a loader reads them."""
    memory.release()
    rows, damage = source.find_or_damage(indices, kept=kept)
    tokens = rows.copy()
    tokens[list(damage)] = source.eos_id
    return tokens, damage


@pytest.mark.usefixtures("either_kernel")
def test_a_block_with_room_is_read_and_checked_once(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = reads_of(monkeypatch)
    sources = sources_of(folders)
    blocks = sum(int(source.shards.blocks.sum()) for source in sources)
    with loader_of(order_of(sources), sources, end_step=300) as loader:
        list(loader)
    assert counts == {"blocks": blocks, "rows": 0, "checks": blocks}
    # another loader of these sources finds its memory empty, and fills it with blocks that were checked before
    with loader_of(order_of(sources), sources, end_step=300) as loader:
        list(loader)
    assert counts == {"blocks": 2 * blocks, "rows": 0, "checks": 2 * blocks}


@pytest.mark.usefixtures("either_kernel")
def test_without_room_blocks_are_checked_once_and_their_sequences_read_singly(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = reads_of(monkeypatch)
    sources = sources_of(folders)
    with loader_of(order_of(sources), sources, end_step=300, memory=BlockMemory(0)) as loader:
        list(loader)
    assert counts["checks"] == sum(int(source.shards.blocks.sum()) for source in sources)
    assert counts["rows"] > 0


@pytest.mark.usefixtures("either_kernel")
def test_what_a_step_needed_makes_room_for_what_the_next_one_needs(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One place and windows of about a block: the sequences of a block come one after the other, and take one read."""
    monkeypatch.setattr(step_reader, "_BYTES_AT_ONCE", 1)
    counts = reads_of(monkeypatch)
    (source,) = sources_of(folders[:1])
    order = Order(5, [OrderSource("code", source.sequences)], mode="windowed", windows=Windows(1, 4))
    one = {"micro_batch": 1, "plan": BatchPlan(1), "end_step": source.sequences, "memory": BlockMemory(PLACE[64])}
    with loader_of(order, [source], **one) as loader:
        list(loader)
    assert counts["blocks"] == int(source.shards.blocks.sum())
    assert counts["rows"] < source.sequences // 4, "read again, one by one"


@pytest.mark.usefixtures("either_kernel")
def test_a_block_that_was_found_damaged_stays_so_though_it_is_mended(copied: Path) -> None:
    """Else the holes of a run would hang on when it was read, and by whom."""
    path, source = shard_path(copied, "000000"), TokenSource(copied, "web", "train", SEQ)
    good = path.read_bytes()
    overwrite(path, source.manifest.layout.data_offset(1))
    memory = BlockMemory()
    (kept,) = memory.lend([source])
    assert list(read_kept(source, memory, kept, [5])[1]) == [0]
    path.write_bytes(good)
    rows, damage = read_kept(source, memory, kept, [0, 5, 9])
    assert list(damage) == [1]
    assert (rows[1] == source.eos_id).all()
    assert list(read_kept(source, memory, None, [5])[1]) == [0]


def test_memory_is_bounded_and_no_larger_than_the_sources(folders: list[Path]) -> None:
    sources = sources_of(folders)
    blocks = sum(int(source.shards.blocks.sum()) for source in sources)
    for limit, places in ((0, 0), (PLACE[128] - 1, 0), (PLACE[128], 1), (10 * PLACE[128] + 5, 10), (1 << 30, blocks)):
        memory = BlockMemory(limit)
        parts = memory.lend(sources)
        assert memory._room.nbytes == places * PLACE[128] <= limit
        assert all((part is None) == (places == 0) for part in parts)


def test_memory_that_is_lent_again_is_the_same_memory_and_empty(folders: list[Path], copied: Path) -> None:
    memory = BlockMemory(1 << 20)
    first = [TokenSource(copied, "web", "train", SEQ)]
    with loader_of(order_of(first), first, memory=memory) as loader:
        list(loader)
    room = memory._room
    again = sources_of(folders[:1])
    memory._room[:] = 255
    with loader_of(order_of(again), again, memory=memory) as loader:
        assert [rows_of(step) for step in loader] == tokens_of(order_of(again), sources_of(folders[:1]), 120)
    assert memory._room is room


def test_memory_in_which_a_stuck_thread_may_write_is_not_lent(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PATIENCE_SECONDS", 0.05)
    memory, sources = BlockMemory(), [TokenSource(copied, "web", "train", SEQ)]
    order, reading, answers = order_of(sources), threading.Event(), threading.Event()

    def stuck(files: LocalShards, *place: Any) -> OpenFile:
        reading.set()
        answers.wait(60)
        return opened(files, *place)

    opened = LocalShards.open
    monkeypatch.setattr(LocalShards, "open", stuck)
    loader = loader_of(order, sources, memory=memory, prefetch=2)
    reading.wait(60)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"still in use: .* not closed, or .* stuck .* give another BlockMemory"):
            loader_of(order, sources, memory=memory)
        loader.close()
    answers.set()
    while loader._ahead and loader._ahead.is_running():
        time.sleep(0.01)
    with loader_of(order, sources, memory=memory) as again:
        assert [rows_of(step) for step in again] == tokens_of(order, sources, 120)


@pytest.mark.usefixtures("either_kernel")
def test_two_blocks_of_one_place_are_not_read_into_it_together(copied: Path) -> None:
    """Nor is what stands there taken for the first when the second turns out to be damaged."""
    source = TokenSource(copied, "web", "train", SEQ)
    whole = source.read(np.arange(16))
    source = TokenSource(copied, "web", "train", SEQ)
    memory = BlockMemory(3 * PLACE[64])
    (kept,) = memory.lend([source])
    overwrite(shard_path(copied, "000000"), source.manifest.layout.data_offset(3))
    rows, damage = read_kept(source, memory, kept, list(range(16)))
    assert sorted(damage) == [12, 13, 14, 15]
    assert np.array_equal(rows[:12], whole[:12])


@pytest.mark.usefixtures("either_kernel")
def test_a_block_found_damaged_after_it_was_right_is_no_longer_checked(copied: Path) -> None:
    source = TokenSource(copied, "web", "train", SEQ)
    source.read(np.arange(16))
    overwrite(shard_path(copied, "000000"), source.manifest.layout.data_offset(3))
    memory = BlockMemory()
    (kept,) = memory.lend([source])
    assert sorted(read_kept(source, memory, kept, [12])[1]) == [0]


def overwrite(path: Path, offset: int) -> None:
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(b"\x07\x00" * 40)


@pytest.mark.usefixtures("either_kernel")
@pytest.mark.parametrize("change", ["cut", "overwritten", "removed"])
@pytest.mark.parametrize("on_damage", ["stop", "hole"])
def test_a_file_that_changes_under_a_running_loader(
    copied: Path, change: str, on_damage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read and checked before is used on; what was not is damage with its place."""
    monkeypatch.setattr(step_reader, "_SECONDS_AT_ONCE", 60)
    source = TokenSource(copied, "web", "train", SEQ, on_damage=on_damage)
    order = order_of([source])
    expected = tokens_of(order, [TokenSource(copied, "web", "train", SEQ)], 120)
    located = order.locate(0, 960).sequence
    shards = [source.place(sequence).shard for sequence in located.tolist()]
    blocks = [(shard, source.place(sequence).block) for shard, sequence in zip(shards, located.tolist(), strict=True)]
    loader = loader_of(order, [source], on_damage=on_damage)
    steps = [loader.next_step() for _ in range(2)]
    path, layout = shard_path(copied, "000001"), source.manifest.layout
    taken = 8 + 4 * 8  # the first step was read alone, and then four times as much: that was read ahead
    fresh = [block for block in dict.fromkeys(blocks) if block[0] == "000001" and block not in blocks[:taken]]
    assert fresh
    assert [block for block in blocks[taken:] if block in blocks[:taken] and block[0] == "000001"]
    if change == "cut":
        os.truncate(path, layout.data_offset(0) + 5)
    elif change == "removed":
        source.close()  # an open file would go on being there
        path.unlink()
    else:
        for block in range(int(source.shards.blocks[1])):
            overwrite(path, layout.data_offset(block))
    if on_damage == "stop":
        with pytest.raises(DataError, match=r"000001\.tar"):
            steps.extend(loader)
        first = next(number for number in range(0, 960, 8) if not set(fresh).isdisjoint(blocks[number : number + 8]))
        assert len(steps) == first // 8
    else:
        steps += list(loader)
    loader.close()
    lost = [hole.position for step in steps for hole in step.damage]
    assert lost == [p for p in range(8 * len(steps)) if blocks[p] in fresh]
    for number, step in enumerate(steps):
        for row, (found, wanted) in enumerate(zip(rows_of(step), expected[number], strict=True)):
            assert found == (wanted if 8 * number + row not in lost else [source.eos_id] * (SEQ + 1))


@pytest.mark.usefixtures("either_kernel")
def test_a_damaged_block_leaves_nothing_behind_in_its_place(copied: Path) -> None:
    """Place 0 is the only one: a block that is found damaged on the way there must not pass for itself or another."""
    source = TokenSource(copied, "web", "train", SEQ)
    overwrite(shard_path(copied, "000000"), source.manifest.layout.data_offset(1))
    whole = source.read(np.arange(4))
    memory = BlockMemory(PLACE[64])
    (kept,) = memory.lend([source])
    assert kept is not None
    for _ in range(2):
        assert np.array_equal(read_kept(source, memory, kept, [1])[0], whole[[1]])
        rows, damage = read_kept(source, memory, kept, [5, 2])
        assert list(damage) == [0]
        assert damage[0].block == 1
        assert (rows[0] == source.eos_id).all()
        assert np.array_equal(rows[1], whole[2])
        rows, damage = read_kept(source, memory, kept, [6])
        assert list(damage) == [0]


@pytest.mark.usefixtures("either_kernel")
def test_a_disk_error_leaves_nothing_behind_in_its_place(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the disk is made, for a real one can't be; it comes when half of the block is there."""
    (source,) = sources_of(folders[:1])
    whole = source.read(np.arange(8))
    memory = BlockMemory(PLACE[64])
    (kept,) = memory.lend([source])
    assert np.array_equal(read_kept(source, memory, kept, [0])[0], whole[[0]])
    read = OpenFile.read

    def failing(file: OpenFile, into: memoryview, offset: int) -> int:
        into[:60] = bytes(60)
        raise OSError(5, "Input/output error")

    fresh = TokenSource(folders[0], "web", "train", SEQ)  # has checked nothing yet
    with monkeypatch.context() as patched:
        patched.setattr(type(load()), "read", lambda *_: 0)
        patched.setattr(OpenFile, "read", failing)
        with pytest.raises(OSError, match="Input/output error"):
            read_kept(fresh, memory, kept, [4])
    assert OpenFile.read is read
    assert np.array_equal(read_kept(fresh, memory, kept, [0, 4])[0], whole[[0, 4]])


@pytest.mark.usefixtures("either_kernel")
def test_batches_stay_as_they_were_handed_out(folders: list[Path]) -> None:
    """Whatever is read later, and whatever their owner does to the others."""
    sources = sources_of(folders)
    order = order_of(sources)
    expected = tokens_of(order, sources_of(folders), 120)
    memory = BlockMemory(5 * PLACE[128])
    with loader_of(order, sources, memory=memory, prefetch=2) as loader:
        kept = []
        for number, step in enumerate(loader):
            for batch in step.micro_batches:
                if number % 3 == 1:
                    for tensor in (batch.rows, batch.ids):
                        tensor.fill_(-5)
            kept.append(step)
    memory._room[:] = 255
    for number, step in enumerate(kept):
        if number % 3 == 1:
            continue
        assert rows_of(step) == expected[number]
        batches = step.micro_batches
        assert torch.cat([batch.labels for batch in batches]).tolist() == [row[1:] for row in expected[number]]
        positions = torch.cat([batch.run_positions for batch in batches]).tolist()
        assert positions == list(range(8 * number, 8 * number + 8))


@pytest.mark.parametrize("slow", [False, True])
def test_steps_are_read_together_only_while_that_is_quick(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    sources = sources_of(folders[:1])
    monkeypatch.setattr(step_reader, "_SECONDS_AT_ONCE", 0.02 if slow else 60)
    read, sizes = sources[0].find_or_damage, []

    def reading(indices: np.ndarray, *rest: Any) -> Any:
        sizes.append(len(indices))
        if slow:
            time.sleep(0.005 * len(indices))
        return read(indices, *rest)

    monkeypatch.setattr(sources[0], "find_or_damage", reading)
    with loader_of(order_of(sources), sources, end_step=20 if slow else 2000) as loader:
        steps = list(loader)
    assert [rows_of(step) for step in steps[:20]] == tokens_of(order_of(sources), sources_of(folders[:1]), 20)
    if slow:
        assert sizes == [8] * 20
    else:
        assert sizes[:4] == [8, 32, 128, 512]
        assert max(sizes) * 2 * (SEQ + 1) <= step_reader._BYTES_AT_ONCE
