"""Reading from a real http server: every window once, ahead of its need, through a cache that is never trusted."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.damage import OnDamage
from data_pipeline.errors import DataError
from data_pipeline.layout import shard_path
from data_pipeline.loader import EvaluationLoader, StepLoader
from data_pipeline.manifest import read_manifest
from data_pipeline.order import Order, OrderSource
from data_pipeline.reader import TokenSource
from data_pipeline.storage import CacheSettings, RemoteSettings, StorageSettings
from data_pipeline.testing import write_token_dataset
from data_pipeline.windowed import Windows
from tests.http_server import Faults, HttpServer

SEQ, BLOCK, BLOCKS, SHARDS = 16, 64, 96, 4
WINDOWS = Windows(strata=4, sequences=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("remote") / "data"
    documents = [rng.integers(3, 300, rng.integers(20, 90)).tolist() for _ in range(SHARDS * BLOCKS)]
    write_token_dataset(path, {("web", "train"): documents}, block_tokens=BLOCK, documents_per_shard=BLOCKS)
    return path


@pytest.fixture(scope="module")
def local(folder: Path) -> TokenSource:
    return TokenSource(folder, "web", "train", SEQ)


@pytest.fixture
def server(folder: Path) -> Iterator[HttpServer]:
    with HttpServer(folder) as running:
        yield running


def settings(tmp_path: Path, **remote: float) -> StorageSettings:
    patience = {"first_backoff_seconds": 0.001, "longest_backoff_seconds": 0.01}
    return StorageSettings(
        cache=CacheSettings(folder=str(tmp_path / "cache")), remote=RemoteSettings.model_validate(patience | remote)
    )


def order_of(source: TokenSource, windowed: bool = True) -> Order:
    sources = [OrderSource("web", source.sequences)]
    return Order(7, sources, mode="windowed", windows=WINDOWS) if windowed else Order(7, sources)


def read_all(
    sources: list[TokenSource], order: Order, steps: int, micro_batch: int = 4, together: bool = True
) -> list[list[list[int]]]:
    """What each rank's loader hands out over ``steps`` steps, as rows; the ranks are threads that keep in step."""
    found: list[list[list[int]]] = [[] for _ in sources]
    barrier = threading.Barrier(len(sources))

    def rank(number: int) -> None:
        plan = BatchPlan(len(sources) * micro_batch)
        with StepLoader(
            order, [sources[number]], rank=number, world_size=len(sources), micro_batch=micro_batch, plan=plan,
            seq_len=SEQ, start_step=0, start_position=0, end_step=steps,
        ) as loader:  # fmt: skip
            for step in loader:
                found[number] += step.micro_batches[0].rows.tolist()
                if together:
                    barrier.wait(30)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(sources))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def tars(server: HttpServer) -> Counter[str]:
    return Counter({path: count for path, count in server.gets.items() if path.endswith(".tar")})


def windows_of_epoch(source: TokenSource, order: Order) -> int:
    """How many (shard, window) there are: what must be fetched in an epoch."""
    every = np.arange(source.sequences)
    first, stop = order.window(0, every)
    shards = [source.place(q).shard for q in every.tolist()]
    return len(set(zip(shards, first.tolist(), stop.tolist(), strict=True)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_window_is_fetched_once_an_epoch_by_a_node(
    ranks: int, server: HttpServer, local: TokenSource, tmp_path: Path
) -> None:
    order = order_of(local)
    sources = [TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path)) for _ in range(ranks)]
    steps = local.sequences // (4 * ranks)
    found = read_all(sources, order, steps)
    located = order.locate(0, steps * 4 * ranks)
    expected = local.read(located.sequence).reshape(steps, ranks, 4, -1)
    for rank in range(ranks):
        assert found[rank] == expected[:, rank].reshape(steps * 4, -1).tolist()
    seen = len({(local.place(q).shard, *map(int, np.ravel(order.window(0, [q])))) for q in located.sequence.tolist()})
    assert windows_of_epoch(local, order) >= seen > 0.9 * windows_of_epoch(local, order)
    # the loaders look further ahead than the last step, where the next epoch begins
    fetched = sum(source.fetched for source in sources)
    assert seen <= fetched <= windows_of_epoch(local, order)
    assert tars(server).total() == fetched


def test_two_ranks_that_need_one_shard_download_it_once(server: HttpServer, local: TokenSource, tmp_path: Path) -> None:
    order = order_of(local, windowed=False)
    sources = [TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path)) for _ in range(2)]
    found = read_all(sources, order, 20)
    located = order.locate(0, 160).sequence.reshape(20, 2, 4)
    assert [local.read(located[:, rank].ravel()).tolist() for rank in range(2)] == found
    assert tars(server) == {f"shards/{number:06d}.tar": 1 for number in range(SHARDS)}
    assert sum(source.fetched for source in sources) == SHARDS


def test_latency_is_hidden_by_fetching_ahead(folder: Path, local: TokenSource, tmp_path: Path) -> None:
    """The server counts what is under way: a stopwatch would measure how busy the machine is."""
    order = order_of(local)
    with HttpServer(folder, Faults(latency=0.05)) as server:
        source = TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path))
        server.most_at_once = 0
        read_all([source], order, local.sequences // 4)
        assert source.fetched > 24
        assert server.most_at_once > 1


def test_nothing_is_lost_through_a_failing_server(folder: Path, local: TokenSource, tmp_path: Path) -> None:
    order = order_of(local)
    steps = local.sequences // 4
    with HttpServer(folder, Faults(error_rate=0.3, early_close_rate=0.3)) as server:
        source = TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path))
        (found,) = read_all([source], order, steps)
        assert server.faulty > 5
    assert found == local.read(order.locate(0, steps * 4).sequence).tolist()


@pytest.mark.parametrize("windowed", [True, False])
@pytest.mark.parametrize("spoil", ["flip", "cut"])
def test_what_went_bad_in_the_cache_is_fetched_again(
    spoil: str, windowed: bool, server: HttpServer, local: TokenSource, tmp_path: Path
) -> None:
    storage = settings(tmp_path)
    every = np.arange(local.sequences)
    windows = np.stack(order_of(local, windowed).window(0, every))
    with TokenSource(server.url, "web", "train", SEQ, storage=storage) as source:
        source.read(every, windows)
        fetched = source.fetched
    layout = local.manifest.layout
    archives = {digest.tobytes().hex() for digest in local.shards.sha256}
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.name.split("-")[0] in archives]
    assert len(kept) == fetched
    for path in kept:
        content = bytearray(path.read_bytes())
        begin = 0 if "-" in path.name else layout.data_offset(0)
        # of a block in the middle: those at the ends of a window may be read from its neighbour
        content[begin + len(content) // layout.member_stride // 2 * layout.member_stride + 4] ^= 1
        path.write_bytes(content if spoil == "flip" else content[: len(content) // 2])
    with TokenSource(server.url, "web", "train", SEQ, storage=storage) as source:
        assert np.array_equal(source.read(every, windows), local.read(every))
        assert source.fetched == fetched


@pytest.mark.parametrize("on_damage", ["stop", "hole"])
def test_an_index_that_went_bad_in_the_cache_is_fetched_again(
    on_damage: OnDamage, server: HttpServer, local: TokenSource, tmp_path: Path
) -> None:
    storage, every = settings(tmp_path), np.arange(local.sequences)
    with TokenSource(server.url, "web", "train", SEQ, storage=storage) as source:
        source.read(every)
    spoilt = 0
    for digest in local.shards.idx_sha256:
        (entry,) = (tmp_path / "cache").rglob(digest.tobytes().hex())
        content = bytearray(entry.read_bytes())
        content[len(content) // 2] ^= 1
        entry.write_bytes(content)
        spoilt += 1
    assert spoilt > 1
    with TokenSource(server.url, "web", "train", SEQ, storage=storage, on_damage=on_damage) as source:
        rows, damage = source.read_or_damage(every)
    assert not damage
    assert np.array_equal(rows, local.read(every))


def test_a_damaged_index_takes_its_shard_and_no_other(folder: Path, local: TokenSource, tmp_path: Path) -> None:
    every = np.arange(local.sequences)
    windows = np.stack(order_of(local).window(0, every))
    of_shard = np.array([local.place(q).shard == "000001" for q in every.tolist()])
    with HttpServer(folder) as server:
        server.plan("shards/000001.idx", *["404"] * 1000)
        source = TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path), on_damage="hole")
        rows, damage = source.read_or_damage(every, windows)
    assert sorted(damage) == np.flatnonzero(of_shard).tolist()
    assert {error.reason for error in damage.values()} == {"index"}
    assert np.array_equal(rows[~of_shard], local.read(every[~of_shard]))


def test_an_unreachable_server_is_no_damage(folder: Path, tmp_path: Path) -> None:
    """Holes are for what is lost; a server that is down for a while would tear thousands of them."""
    with HttpServer(folder) as server:
        storage = settings(tmp_path, attempts=3)
        source = TokenSource(server.url, "web", "train", SEQ, storage=storage, on_damage="hole")
        server.plan("shards/000000.tar", *["error"] * 3)
        with pytest.raises(DataError, match=r"000000\.tar.*503"):
            source.read_or_damage([0])
        assert source.read_or_damage([0])[1] == {}


def test_a_refusal_is_no_damage(folder: Path, tmp_path: Path) -> None:
    """An expired token would tear a hole wherever the run reads, and the next start would train on other samples."""
    for whole, status in ((True, "403"), (False, "401")):
        windows = None if whole else np.array([[0], [WINDOWS.sequences]])
        storage = settings(tmp_path / status)
        with HttpServer(folder) as server:
            source = TokenSource(server.url, "web", "train", SEQ, storage=storage, on_damage="hole")
            server.plan("shards/000000.tar", status)
            with pytest.raises(DataError, match=rf"000000\.tar.*refuses it \(HTTP status {status}"):
                source.read_or_damage([0], windows)
            assert source.read_or_damage([0], windows)[1] == {}


@pytest.mark.parametrize("windowed", [False, True])
def test_what_is_fetched_again_because_it_is_damaged_is_checked_again(
    folder: Path, tmp_path: Path, windowed: bool
) -> None:
    """The node's cache has lost it, and the server has another damage by now, in a block that was right before."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path, layout = shard_path(copy, "000000"), read_manifest(copy).layout

    def turn(block: int) -> None:
        with open(path, "r+b") as file:
            file.seek(layout.data_offset(block))
            byte = file.read(1)
            file.seek(layout.data_offset(block))
            file.write(bytes([byte[0] ^ 1]))

    turn(0)
    storage = StorageSettings(cache=CacheSettings(folder=str(tmp_path / "cache")))
    with HttpServer(copy) as server:
        source = TokenSource(server.url, None, "train", SEQ, storage=storage, on_damage="hole")
        per_block = layout.block_tokens // SEQ
        wanted = np.arange(2 * per_block)
        windows = np.stack([np.zeros_like(wanted), np.full_like(wanted, 2 * per_block)]) if windowed else None
        assert sorted(source.read_or_damage(wanted, windows)[1]) == list(range(per_block))
        turn(1)
        shutil.rmtree(tmp_path / "cache")
        source.close()
        last = wanted[-1:]
        _, damage = source.read_or_damage(last, None if windows is None else windows[:, -1:])
        assert damage[0].block == 1
        assert damage[0].reason == "checksum"


def test_what_was_found_damaged_is_not_remembered_for_the_next_run(folder: Path, tmp_path: Path) -> None:
    """Restored in part between two attempts: only what is still damaged is lost."""
    every = np.arange(8 * BLOCK // SEQ)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path, layout = copy / "shards" / "000000.tar", read_manifest(copy).layout
    intact = path.read_bytes()
    with HttpServer(copy) as server:
        for block in (1, 5):
            content = bytearray(intact)
            content[layout.data_offset(block)] ^= 1
            path.write_bytes(content)
            source = TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path), on_damage="hole")
            damage = source.read_or_damage(every, np.stack([np.zeros_like(every), np.full_like(every, 256)]))[1]
            assert {error.block for error in damage.values()} == {block}


@pytest.mark.parametrize("windowed", [True, False])
def test_a_cache_that_is_deleted_under_a_run_is_made_again(
    windowed: bool, server: HttpServer, local: TokenSource, tmp_path: Path
) -> None:
    every = np.arange(local.sequences)
    windows = np.stack(order_of(local, windowed).window(0, every))
    source = TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path), on_damage="hole")
    source.read_or_damage(every[:4], windows[:, :4])
    shutil.rmtree(tmp_path / "cache")
    rows, damage = source.read_or_damage(every, windows)
    assert damage == {}
    assert np.array_equal(rows, local.read(every))


def test_a_server_that_stalls_is_named(server: HttpServer, tmp_path: Path) -> None:
    source = TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path, timeout_seconds=0.6))
    order = order_of(source)
    for number in range(SHARDS):
        server.plan(f"shards/{number:06d}.tar", "stall")
    told: list[str] = []
    with StepLoader(
        order, [source], rank=0, world_size=1, micro_batch=4, plan=BatchPlan(4), seq_len=SEQ, start_step=0,
        start_position=0, end_step=3, watchdog_seconds=0.1, on_wait=told.append,
    ) as loader:  # fmt: skip
        assert len(list(loader)) == 3
    assert f"shard {server.url}/shards/00000" in told[0]
    assert "source 'web' has been waiting for 0." in told[0]


def test_an_evaluation_fetches_what_it_reads_in_pieces(server: HttpServer, local: TokenSource, tmp_path: Path) -> None:
    source = TokenSource(server.url, "web", "train", SEQ, storage=settings(tmp_path))
    loader = EvaluationLoader(source, rank=0, world_size=1, micro_batch=8, sequences=40)
    rows = np.concatenate([batch.rows.numpy() for batch in loader])
    assert np.array_equal(rows, local.read(np.arange(40)))
    assert set(tars(server)) <= {f"shards/{number:06d}.tar" for number in range(3)}
