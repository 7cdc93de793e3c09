"""Any schedule of ranks, batches, ramps, skipped ranges, prefetch and kills reads one stream, compared as a stream."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.errors import UserError
from data_pipeline.loader import StepLoader
from data_pipeline.order import Order, OrderSource
from data_pipeline.reader import TokenSource
from data_pipeline.schedule import ORDER_CHUNK, locate
from data_pipeline.testing import write_token_dataset
from data_pipeline.windowed import Windows

SEQ = 8


@dataclasses.dataclass
class Data:
    sources: list[TokenSource]
    orders: dict[str, Order]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("schedules") / "data"
    rng = np.random.default_rng(0)
    content = {
        (name, "train"): [rng.integers(3, 300, rng.integers(1, 60)).tolist() for _ in range(count)]
        for name, count in (("code", 160), ("docs", 12))
    }
    write_token_dataset(folder, content, block_tokens=64, documents_per_shard=50)
    sources = [TokenSource(folder, domain, "train", SEQ) for domain in ("code", "docs")]
    named = [OrderSource(name, source.sequences) for name, source in zip(("code", "docs"), sources, strict=True)]
    orders = {
        "full": Order(5, named),
        "windowed": Order(5, named, mode="windowed", windows=Windows(strata=4, sequences=16)),
    }
    return Data(sources, orders)


@st.composite
def plans(draw: st.DrawFn) -> tuple[BatchPlan, int, int]:
    """A plan, with ranks and micro-batch that divide all of its batches."""
    world, micro = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batches = st.integers(1, 4).map(lambda parts: parts * world * micro)
    ramp = draw(st.lists(st.tuples(st.integers(1, 4), batches), max_size=3))
    borders = draw(st.lists(st.integers(0, 300), max_size=6, unique=True).map(sorted))
    ranges = tuple(zip(borders[::2], borders[1::2], strict=False))
    return BatchPlan(draw(batches), tuple(ramp), ranges), world, micro


def allowed(plan: BatchPlan) -> Iterator[int]:
    """The positions that lie in no skipped range, one by one."""
    return (p for p in itertools.count() if not any(start <= p < stop for start, stop in plan.skip_ranges))


def loaders_of(data: Data, order: Order, plan: BatchPlan, world: int, micro: int, **rest: Any) -> list[StepLoader]:
    return [
        StepLoader(
            order, data.sources, rank=rank, world_size=world, micro_batch=micro, plan=plan, seq_len=SEQ, **rest
        )
        for rank in range(world)
    ]  # fmt: skip


def global_step(loaders: list[StepLoader]) -> tuple[list[int], list[int], torch.Tensor, int]:
    """Positions, samples and tokens of one step over all ranks in their order, and where the next step begins."""
    steps = [loader.next_step() for loader in loaders]
    assert len({(step.position, step.next_position, step.global_batch) for step in steps}) == 1
    batches = [step.micro_batches[g] for g in range(len(steps[0].micro_batches)) for step in steps]
    positions = torch.cat([batch.run_positions for batch in batches]).tolist()
    assert len(positions) == steps[0].global_batch
    samples = torch.cat([batch.sample_ids for batch in batches]).tolist()
    return positions, samples, torch.cat([batch.rows for batch in batches]), steps[0].next_position


@settings(max_examples=60, deadline=None)
@given(plan=plans(), mode=st.sampled_from(["full", "windowed"]), prefetch=st.integers(0, 3), legs=st.data())
def test_one_stream_however_it_is_split_killed_and_resumed(
    data: Data, plan: tuple[BatchPlan, int, int], mode: str, prefetch: int, legs: st.DataObject
) -> None:
    """Each leg may change ranks and micro-batch; what was prefetched when a leg ends is lost with it."""
    batch_plan, world, micro = plan
    order = data.orders[mode]
    step, position = 0, 0
    seen_positions, seen_samples = [], []
    while step < 14:
        splits = [
            (w, m)
            for w in range(1, 4)
            for m in range(1, 4)
            if all(b % (w * m) == 0 for b in (batch_plan.global_batch, *(b for _, b in batch_plan.ramp)))
        ]
        world, micro = legs.draw(st.sampled_from(splits))
        rest = {"start_step": step, "start_position": position, "end_step": 100, "prefetch": prefetch}
        loaders = loaders_of(data, order, batch_plan, world, micro, **rest)
        for _ in range(legs.draw(st.integers(1, 6))):
            positions, samples, rows, position = global_step(loaders)
            assert len(positions) == batch_plan.batch(step)
            stored = [data.sources[int(s >= data.sources[0].sequences)] for s in samples]
            first = samples[0] - (data.sources[0].sequences if stored[0] is data.sources[1] else 0)
            assert rows[0].tolist() == stored[0].read([first])[0].tolist()
            seen_positions += positions
            seen_samples += samples
            step += 1
        assert all(loader.position == position for loader in loaders)
        for loader in loaders:
            loader.close()
    expected = list(itertools.islice(allowed(batch_plan), len(seen_positions)))
    assert seen_positions == expected
    one_by_one = [order.locate(p, 1) for p in expected]
    bases = order.sample_bases
    assert seen_samples == [int(bases[one.source[0]] + one.sequence[0]) for one in one_by_one]


def test_positions_over_gaps_are_located_as_one_by_one(data: Data) -> None:
    rng = np.random.default_rng(0)
    for mode, order in data.orders.items():
        for gap in (0, 5, ORDER_CHUNK - 1, ORDER_CHUNK, ORDER_CHUNK + 1, 10**9):
            positions = np.sort(rng.choice(3000, 200, replace=False))
            positions[100:] += gap
            found = locate(order, positions)
            for k in (0, 99, 100, 199):
                one = order.locate(int(positions[k]), 1)
                assert [int(values[k]) for values in found] == [int(values[0]) for values in one], (mode, gap)


def test_a_huge_skipped_range_costs_nothing(data: Data) -> None:
    plan = BatchPlan(8, skip_ranges=((20, 10**12),))
    began = time.perf_counter()
    (loader,) = loaders_of(data, data.orders["full"], plan, 1, 8, start_step=0, start_position=0, end_step=9)
    steps = list(loader)
    loader.close()
    assert time.perf_counter() - began < 2
    assert [step.position for step in steps[:4]] == [0, 8, 16, 10**12 + 4]
    assert steps[2].micro_batches[0].run_positions.tolist() == [16, 17, 18, 19, *range(10**12, 10**12 + 4)]


def test_every_batch_of_a_ramp_must_divide(data: Data) -> None:
    plan = BatchPlan(12, ramp=((5, 6), (5, 9)))
    with pytest.raises(UserError, match=r"global batch of 9 sequences can't be divided .* 3 x 2 = 6"):
        loaders_of(data, data.orders["full"], plan, 2, 3, start_step=0, start_position=0, end_step=9)


def read_in_child(source: TokenSource, expected: np.ndarray, answers: Any) -> None:
    answers.put(bool(np.array_equal(source.read(np.arange(len(expected))), expected)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_goes_into_another_process(data: Data, method: str) -> None:
    """Also while a thread of the parent is in the middle of a read, which a forked child inherits as a held lock."""
    source = data.sources[0]
    expected = source.read(np.arange(source.sequences))
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    if method == "fork":
        source._lock.acquire()
    child = context.Process(target=read_in_child, args=(source, expected, answers))
    child.start()
    if method == "fork":
        source._lock.release()
    assert answers.get(timeout=60)
    child.join(10)
    assert child.exitcode == 0


def test_a_pickled_source_reads_the_same(data: Data) -> None:
    source = data.sources[1]
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(again.read([3, 1]), source.read([3, 1]))


def test_nothing_is_put_into_shared_memory(data: Data) -> None:
    before = set(os.listdir("/dev/shm"))
    (loader,) = loaders_of(
        data, data.orders["full"], BatchPlan(8), 1, 8, start_step=0, start_position=0, end_step=9, prefetch=3
    )
    list(loader)
    loader.close()
    mine = [name for name in set(os.listdir("/dev/shm")) - before if str(os.getpid()) in name]
    assert mine == []
