"""Law 1 at the loader: the same samples in the same order however a run is split, prefetched or resumed."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import ahead, step_reader
from data_pipeline.batch_plan import BatchPlan
from data_pipeline.errors import DataError, UserError
from data_pipeline.layout import shard_path
from data_pipeline.loader import Step, StepLoader
from data_pipeline.mixture import Phase
from data_pipeline.order import Order, OrderSource
from data_pipeline.reader import TokenSource
from data_pipeline.schedule import step_offsets
from data_pipeline.testing import write_token_dataset

SEQ = 16
STEPS = 12
BATCH = 24


def documents(seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, rng.integers(1, 60)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "data"
    content = {
        ("code", "train"): documents(0, 60),
        ("docs", "train"): documents(1, 4),
    }
    write_token_dataset(path, content, block_tokens=64, documents_per_shard=20)
    return path


@pytest.fixture(scope="module")
def sources(folder: Path) -> list[TokenSource]:
    return [TokenSource(folder, domain, "train", SEQ) for domain in ("code", "docs")]


@pytest.fixture(scope="module")
def order(sources: list[TokenSource]) -> Order:
    code, docs = (source.sequences for source in sources)
    assert docs < BATCH < code
    # the weights change inside a step, and docs is repeated several times within one
    return Order(11, [OrderSource("code", code, 1), OrderSource("docs", docs, 2)], [Phase(101, {"code": 1, "docs": 1})])


def make_loader(order: Order, sources: list[TokenSource], **changes: Any) -> StepLoader:
    settings: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "micro_batch": BATCH,
        "plan": BatchPlan(BATCH),
        "seq_len": SEQ,
        "start_step": 0,
        "start_position": 0,
        "end_step": STEPS,
        "prefetch": 0,
    }
    return StepLoader(order, sources, **{**settings, **changes})


def run_steps(order: Order, sources: list[TokenSource], **changes: Any) -> list[Step]:
    with make_loader(order, sources, **changes) as loader:
        return list(loader)


def wait_until_ready(loader: StepLoader, steps: int) -> None:
    """Wait until exactly so many steps are made ahead, and no more come."""
    assert loader._ahead is not None
    deadline = time.monotonic() + 30
    while len(loader._ahead._ready) < steps and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(loader._ahead._ready) == steps


def stack(steps_of_ranks: list[list[Step]], name: str) -> list[torch.Tensor]:
    """One field of every global step, put together from the ranks: micro-step after micro-step, rank after rank."""
    return [
        torch.cat(
            [
                getattr(ranks[rank].micro_batches[micro_step], name)
                for micro_step in range(len(ranks[0].micro_batches))
                for rank in range(len(ranks))
            ]
        )
        for ranks in zip(*steps_of_ranks, strict=True)
    ]


NAMES = ("tokens", "labels", "loss_mask", "positions", "document_ids", "source_ids", "sample_ids", "run_positions")


@pytest.fixture(scope="module")
def whole(order: Order, sources: list[TokenSource]) -> dict[str, list[torch.Tensor]]:
    steps = run_steps(order, sources)
    assert len(steps) == STEPS
    return {name: stack([steps], name) for name in NAMES}


def test_a_step_holds_what_the_order_says(
    order: Order, sources: list[TokenSource], whole: dict[str, list[torch.Tensor]]
) -> None:
    for number in range(STEPS):
        located = order.locate(number * BATCH, BATCH)
        assert whole["source_ids"][number].tolist() == located.source.tolist()
        bases = np.array([0, sources[0].sequences])
        assert whole["sample_ids"][number].tolist() == (bases[located.source] + located.sequence).tolist()
        assert whole["run_positions"][number].tolist() == list(range(number * BATCH, (number + 1) * BATCH))
        for row in range(BATCH):
            stored = sources[located.source[row]].read([located.sequence[row]])[0].tolist()
            assert whole["tokens"][number][row].tolist() == stored[:-1]
            assert whole["labels"][number][row].tolist() == stored[1:]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 3), (2, 12), (3, 1), (3, 4), (3, 8), (4, 2), (4, 6)]
)
def test_steps_are_the_same_for_any_ranks_micro_batch_and_prefetch(
    order: Order,
    sources: list[TokenSource],
    whole: dict[str, list[torch.Tensor]],
    world_size: int,
    micro_batch: int,
    prefetch: int,
) -> None:
    ranks = [
        run_steps(order, sources, rank=rank, world_size=world_size, micro_batch=micro_batch, prefetch=prefetch)
        for rank in range(world_size)
    ]
    assert all(len(step.micro_batches) == BATCH // (world_size * micro_batch) for steps in ranks for step in steps)
    for name in NAMES:
        together = stack(ranks, name)
        assert len(together) == STEPS
        assert all(torch.equal(one, other) for one, other in zip(together, whole[name], strict=True)), name


def test_a_run_in_random_legs_of_other_shapes_gives_one_stream(
    order: Order, sources: list[TokenSource], whole: dict[str, list[torch.Tensor]]
) -> None:
    """Each leg has its own ranks, batch sizes and prefetch, and is left with steps made ahead but not taken."""
    rng = np.random.default_rng(0)
    expected = torch.cat(whole["sample_ids"])
    for _ in range(6):
        position, stream = 0, []
        while position < len(expected):
            world_size, micro_batch, parts = (int(rng.integers(1, 4)) for _ in range(3))
            global_batch = world_size * micro_batch * parts
            loaders = [
                make_loader(
                    order,
                    sources,
                    rank=rank,
                    world_size=world_size,
                    micro_batch=micro_batch,
                    plan=BatchPlan(global_batch),
                    start_position=position,
                    end_step=1000,
                    prefetch=int(rng.integers(0, 4)),
                )
                for rank in range(world_size)
            ]
            for _ in range(int(rng.integers(1, 5))):
                steps = [[loader.next_step()] for loader in loaders]
                assert steps[0][0].position == position
                stream.append(stack(steps, "sample_ids")[0])
                position += global_batch
            assert all(loader.position == position for loader in loaders)
            for loader in loaders:
                loader.close()
        assert torch.equal(torch.cat(stream)[: len(expected)], expected)


def test_an_epoch_of_each_source_passes_every_sequence_once(
    order: Order, sources: list[TokenSource], whole: dict[str, list[torch.Tensor]]
) -> None:
    stream, source_ids = torch.cat(whole["sample_ids"]), torch.cat(whole["source_ids"])
    base = 0
    for number, source in enumerate(sources):
        drawn = (stream[source_ids == number] - base).tolist()
        base += source.sequences
        assert len(drawn) >= source.sequences
        for first in range(0, len(drawn) - source.sequences + 1, source.sequences):
            assert sorted(drawn[first : first + source.sequences]) == list(range(source.sequences))


PROGRAM = """
import json, pathlib, random, sys
import numpy, torch
from data_pipeline import Order, OrderSource, StepLoader, TokenSource
from data_pipeline.batch_plan import BatchPlan

random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
sources = [TokenSource(pathlib.Path(sys.argv[1]), domain, "train", 16) for domain in ("code", "docs")]
order = Order(3, [OrderSource(source.domain, source.sequences) for source in sources])
shape = dict(rank=1, world_size=2, micro_batch=2, plan=BatchPlan(8), seq_len=16)
with StepLoader(order, sources, **shape, start_step=5, start_position=40, end_step=10, prefetch=2) as loader:
    print(json.dumps([[batch.sample_ids.tolist() for batch in step.micro_batches] for step in loader]))
assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
"""


def test_no_hash_seed_and_no_random_state_matters(folder: Path, sources: list[TokenSource]) -> None:
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    order = Order(3, [OrderSource(str(source.domain), source.sequences) for source in sources])
    shape = {"rank": 1, "world_size": 2, "micro_batch": 2, "plan": BatchPlan(8)}
    steps = run_steps(order, sources, **shape, start_step=5, start_position=40, end_step=10)
    assert json.loads(output) == [[batch.sample_ids.tolist() for batch in step.micro_batches] for step in steps]


def test_the_end_stays_the_end(order: Order, sources: list[TokenSource]) -> None:
    for prefetch in (0, 2):
        with make_loader(order, sources, end_step=2, prefetch=prefetch) as loader:
            assert [step.position for step in loader] == [0, BATCH]
            assert loader.position == 2 * BATCH
            for _ in range(2):
                with pytest.raises(StopIteration):
                    loader.next_step()


def test_the_position_counts_steps_taken_not_steps_made(order: Order, sources: list[TokenSource]) -> None:
    with make_loader(order, sources, prefetch=4) as loader:
        wait_until_ready(loader, 4)
        assert loader.position == 0
        loader.next_step()
        assert loader.position == BATCH
        wait_until_ready(loader, 4)
        saved = loader.position
    # saved again before anything was taken: the same state, and the same stream from there
    with make_loader(order, sources, start_step=1, start_position=saved, prefetch=4) as resumed:
        wait_until_ready(resumed, 4)
        assert resumed.position == saved
        again = resumed.position
    rest = run_steps(order, sources, start_step=1, start_position=again)
    for step, expected in zip(rest, run_steps(order, sources)[1:], strict=True):
        assert step.micro_batches[0].sample_ids.tolist() == expected.micro_batches[0].sample_ids.tolist()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_damage_stops_the_run_after_the_steps_before_it_and_every_time(
    folder: Path, tmp_path: Path, prefetch: int
) -> None:
    copy = tmp_path / "data"
    write_token_dataset(copy, {("code", "train"): documents(0, 60)}, block_tokens=64)
    source = TokenSource(copy, "code", "train", SEQ)
    order = Order(0, [OrderSource("code", source.sequences)])
    located = order.locate(0, 2 * source.sequences)
    bad_block = int(located.sequence[40]) // 4
    hit = int(np.flatnonzero(located.sequence // 4 == bad_block)[0])
    with open(shard_path(copy, "000000"), "r+b") as handle:
        handle.seek(source.manifest.layout.data_offset(bad_block) + 10)
        handle.write(b"\xff\xfe")
    settings = {"micro_batch": 2, "plan": BatchPlan(2), "end_step": 500, "prefetch": prefetch}
    with make_loader(order, [source], **settings) as loader:
        for _ in range(hit // 2):
            loader.next_step()
        for _ in range(3):
            with pytest.raises(DataError, match=rf"000000\.tar, block {bad_block} at byte offset \d+ is damaged"):
                loader.next_step()
        assert loader.position == hit // 2 * 2


def test_close_ends_the_thread_and_may_be_called_twice(order: Order, sources: list[TokenSource]) -> None:
    before = threading.active_count()
    loader = make_loader(order, sources, prefetch=2)
    assert threading.active_count() == before + 1
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "step-loader")
    loader.next_step()
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()


def test_a_stuck_read_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has saved on SIGTERM must be gone before its scheduler loses patience."""
    monkeypatch.setattr(ahead, "_PATIENCE_SECONDS", 0.1)
    stuck = threading.Event()
    waiting = ahead.Ahead(stuck.wait, 1)
    ended = threading.Thread(target=waiting.close, daemon=True)
    ended.start()
    ended.join(5)
    assert not ended.is_alive()
    stuck.set()


def test_the_wait_is_measured(order: Order, sources: list[TokenSource], monkeypatch: pytest.MonkeyPatch) -> None:
    read = sources[0].find_or_damage

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return read(*arguments)

    monkeypatch.setattr(sources[0], "find_or_damage", slow)
    with make_loader(order, sources, prefetch=0) as loader:
        loader.next_step()
        assert loader.waited >= 0.2
    with make_loader(order, sources, prefetch=1) as loader:
        wait_until_ready(loader, 1)
        loader.next_step()
        assert loader.waited < 0.1


def test_batches_share_no_memory_with_one_another(order: Order, sources: list[TokenSource]) -> None:
    places = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
        for step in run_steps(order, sources, micro_batch=6, prefetch=2)
        for batch in step.micro_batches
        for tensor in (batch.rows, batch.ids)
    ]
    assert len(places) == STEPS * 4 * 2
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(sorted(places)))


def test_memory_is_flat_over_many_steps(order: Order, sources: list[TokenSource]) -> None:
    with make_loader(order, sources, micro_batch=2, plan=BatchPlan(4), end_step=1 << 40, prefetch=2) as loader:
        for _ in range(300):
            loader.next_step()
        gc.collect()
        tracemalloc.start()
        for _ in range(50):
            loader.next_step()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1500):
            loader.next_step()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    # the cache of keys is bounded but still filling here: a few hundred bytes an epoch of the smallest source
    assert grown < 1_500_000


def test_step_offsets_are_the_assignment_of_the_architecture() -> None:
    for rank in range(3):
        offsets = step_offsets(rank, 3, 2, 24)
        assert offsets.tolist() == [[g * 6 + rank * 2 + i for i in range(2)] for g in range(4)]
    with pytest.raises(ValueError, match="rank 3 of 3"):
        step_offsets(3, 3, 2, 24)


def test_a_batch_that_cannot_be_divided_is_refused(order: Order, sources: list[TokenSource]) -> None:
    message = r"global batch of 24 sequences can't be divided into micro-batches of 5 on 2 ranks.*5 x 2 = 10"
    with pytest.raises(UserError, match=message):
        make_loader(order, sources, world_size=2, micro_batch=5)
    with pytest.raises(UserError, match="micro-batches of 0"):
        make_loader(order, sources, micro_batch=0)


def test_sources_of_two_tokenizers_are_refused(sources: list[TokenSource], tmp_path: Path) -> None:
    write_token_dataset(tmp_path, {("web", "train"): documents(4, 5)}, block_tokens=64, vocab_size=320)
    other = TokenSource(tmp_path, "web", "train", SEQ)
    order = Order(0, [OrderSource("code", sources[0].sequences), OrderSource("web", other.sequences)])
    with pytest.raises(UserError, match=r"source 'web' was made with another tokenizer .* than .* of source 'code'"):
        make_loader(order, [sources[0], other])


def test_sources_that_do_not_fit_the_order_are_refused(order: Order, sources: list[TokenSource]) -> None:
    with pytest.raises(ValueError, match="1 sources were opened for an order of 2"):
        make_loader(order, sources[:1])
    with pytest.raises(ValueError, match=r"source 'code' has \d+ sequences of 16 tokens; .* of 32"):
        make_loader(order, sources, seq_len=32)
    with pytest.raises(ValueError, match="source 'code' has"):
        make_loader(order, sources[::-1])


def test_a_failing_disk_holds_up_its_own_step_only(
    order: Order, sources: list[TokenSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are read several at once: one that the disk fails in later must not take those before it along. The error
    of the disk is made, for a real one can't be."""
    monkeypatch.setattr(step_reader, "_SECONDS_AT_ONCE", 60)
    expected = run_steps(order, sources)
    bad = {int(sample) for sample in expected[7].micro_batches[0].sample_ids if sample < sources[0].sequences}
    bad -= {int(sample) for step in expected[:7] for sample in step.micro_batches[0].sample_ids}
    assert bad
    read = sources[0].find_or_damage
    reads = []

    def failing(indices: np.ndarray, *arguments: Any) -> Any:
        reads.append(len(indices))
        if bad.intersection(indices.tolist()):
            raise OSError(5, "Input/output error")
        return read(indices, *arguments)

    monkeypatch.setattr(sources[0], "find_or_damage", failing)
    with make_loader(order, sources) as loader:
        found = [loader.next_step() for _ in range(7)]
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                loader.next_step()
        bad.clear()
        found += list(loader)
    assert max(reads) > BATCH, "nothing was read together"
    for one, other in zip(found, expected, strict=True):
        assert (one.position, one.next_position) == (other.position, other.next_position)
        assert torch.equal(one.micro_batches[0].rows, other.micro_batches[0].rows)
