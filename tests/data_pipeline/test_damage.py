"""The damage matrix: what is done to a shard x where it lies x stop or hole; nothing else ever moves or changes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.damage import HOLES_ADVICE, Damage
from data_pipeline.errors import DataError
from data_pipeline.layout import BlockLayout, shard_path
from data_pipeline.loader import EvaluationLoader, Step, StepLoader
from data_pipeline.order import Order, OrderSource
from data_pipeline.reader import TokenSource
from data_pipeline.storage import CacheSettings, RemoteSettings, StorageSettings
from data_pipeline.testing import write_token_dataset
from data_pipeline.windowed import Windows
from tests.http_server import HttpServer
from tests.marks import campaign

SEQ, BLOCK, BLOCKS, SHARDS = 16, 64, 24, 3
PER_BLOCK = BLOCK // SEQ
LAYOUT = BlockLayout(BLOCK, "uint16")
SEQUENCES = SHARDS * BLOCKS * PER_BLOCK
PLAN, MICRO = BatchPlan(24), 12


def write_whole(folder: Path, seed: int = 0) -> Path:
    """Three shards of 24 blocks, all of one size; each document fills a block."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, 300, BLOCK - 1).tolist() for _ in range(SHARDS * BLOCKS)]
    content = {("web", "train"): documents, ("web", "heldout"): documents[:BLOCKS]}
    write_token_dataset(folder, content, block_tokens=BLOCK, documents_per_shard=BLOCKS)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole(tmp_path_factory.mktemp("damage") / "data")


def flip(path: Path, offset: int, count: int = 1) -> None:
    with open(path, "r+b") as handle:
        handle.seek(offset)
        old = handle.read(count)
        handle.seek(offset)
        handle.write(bytes(byte ^ 0x15 for byte in old))


def zero(path: Path, start: int, stop: int) -> None:
    with open(path, "r+b") as handle:
        handle.seek(start)
        handle.write(bytes(stop - start))


def header(block: int) -> int:
    return block * LAYOUT.member_stride


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(kept)


@dataclass(frozen=True)
class Case:
    """What is done to shard 1, and what of it is lost: blocks (or everything) by reason."""

    damage: Callable[[Path], Any]
    lost: dict[int, str]
    other: dict[int, str] | None = None
    """What is lost of shard 2."""


def all_blocks(reason: str, first: int = 0) -> dict[int, str]:
    return dict.fromkeys(range(first, BLOCKS), reason)


def other(path: Path, number: int) -> Path:
    return path.with_name(f"{number:06d}.tar")


CASES = {
    "header": Case(lambda path: flip(path, header(5) + 148, 8), {}),
    "payload": Case(lambda path: flip(path, LAYOUT.data_offset(5) + 77), {5: "checksum"}),
    "look-ahead": Case(lambda path: flip(path, LAYOUT.data_offset(5) + 2 * BLOCK), {5: "checksum"}),
    "cut in a header": Case(lambda path: os.truncate(path, header(7) + 100), all_blocks("short", 7)),
    "cut in a payload": Case(lambda path: os.truncate(path, LAYOUT.data_offset(7) + 50), all_blocks("short", 7)),
    "cut between members": Case(lambda path: os.truncate(path, header(7)), all_blocks("short", 7)),
    "cut in the end of the archive": Case(lambda path: os.truncate(path, header(BLOCKS) + 512), {}),
    "zeroed": Case(lambda path: zero(path, header(3) + 300, header(5) + 200), dict.fromkeys((3, 4), "checksum")),
    "missing": Case(os.remove, all_blocks("missing")),
    "duplicated": Case(lambda path: shutil.copy(other(path, 0), path), all_blocks("checksum")),
    "swapped": Case(lambda path: swap(path, other(path, 2)), all_blocks("checksum"), all_blocks("checksum")),
    "no index": Case(lambda path: os.remove(path.with_suffix(".idx")), all_blocks("index")),
    "foreign index": Case(
        lambda path: shutil.copy(other(path, 0).with_suffix(".idx"), path.with_suffix(".idx")), all_blocks("index")
    ),
}
PLACES = ("local", "http", "http windowed", "pipe")
CELLS = [(name, place) for name in CASES for place in PLACES]
CELLS += [
    (name, place) if name in ("payload", "cut in a payload", "missing") else campaign(name, place)
    for name in CASES
    for place in ("local windowed", "pipe windowed")
]


@dataclass
class Bench:
    """A copy of the data set, and how to open it where it lies."""

    folder: Path
    root: str
    storage: StorageSettings
    windowed: bool

    @property
    def in_pieces(self) -> bool:
        """Whether what is read is blocks, not whole shards with all that surrounds their tokens."""
        return not self.root.startswith("pipe:") and (self.windowed or not self.root.startswith("http"))

    def source(self, on_damage: str, split: str = "train") -> TokenSource:
        return TokenSource(self.root, "web", split, SEQ, storage=self.storage, on_damage=on_damage)

    @property
    def order(self) -> Order:
        sources = [OrderSource("text", SEQUENCES)]
        if self.windowed:
            return Order(3, sources, mode="windowed", windows=Windows(strata=3, sequences=32))
        return Order(3, sources)

    def steps(self, source: TokenSource, on_damage: str, prefetch: int = 2) -> Iterator[Step]:
        with StepLoader(
            self.order, [source], rank=0, world_size=1, micro_batch=MICRO, plan=PLAN, seq_len=SEQ, start_step=0,
            start_position=0, end_step=SEQUENCES // 24, prefetch=prefetch, on_damage=on_damage,
        ) as loader:  # fmt: skip
            yield from loader


@pytest.fixture(params=PLACES)
def bench(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> Iterator[Bench]:
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    storage = StorageSettings(
        cache=CacheSettings(folder=str(tmp_path / "cache")),
        remote=RemoteSettings(attempts=2, first_backoff_seconds=0.001, longest_backoff_seconds=0.001),
    )
    with ExitStack() as stack:
        root = str(folder)
        place, _, windowed = request.param.partition(" ")
        if place == "http":
            root = stack.enter_context(HttpServer(folder)).url
        elif place == "pipe":
            root = f"pipe:cat {folder}/{{}}"
        yield Bench(folder, root, storage, bool(windowed))


@pytest.mark.parametrize(("name", "bench"), CELLS, indirect=["bench"])
def test_holes_keep_their_positions_and_nothing_else_changes(name: str, bench: Bench, whole: Path) -> None:
    case = CASES[name]
    undamaged = list(bench.steps(TokenSource(whole, "web", "train", SEQ), "stop"))
    case.damage(shard_path(bench.folder, "000001"))
    source = bench.source("hole")
    steps = list(bench.steps(source, "hole"))
    assert len(steps) == len(undamaged) == SEQUENCES // 24
    lost = {(1, block): reason for block, reason in case.lost.items()}
    lost |= {(2, block): reason for block, reason in (case.other or {}).items()}
    holes = 0
    for before, after in zip(undamaged, steps, strict=True):
        expected = []
        for one, two in zip(before.micro_batches, after.micro_batches, strict=True):
            assert torch.equal(one.run_positions, two.run_positions)
            assert torch.equal(one.source_ids, two.source_ids)
            for row, sample in enumerate(one.sample_ids.tolist()):
                shard, rest = divmod(sample, BLOCKS * PER_BLOCK)
                block = rest // PER_BLOCK
                reason = lost.get((shard, block))
                if reason is None:
                    assert two.sample_ids[row] == sample
                    assert torch.equal(one.rows[row], two.rows[row])
                    continue
                assert two.sample_ids[row] == -1
                assert (two.rows[row] == source.eos_id).all()
                assert not two.loss_mask[row].any()
                offset, position = LAYOUT.data_offset(block), int(one.run_positions[row])
                expected.append(Damage(position, "text", sample, f"{shard:06d}", block, offset, reason))
        assert after.damage == tuple(expected)
        holes += len(expected)
    assert holes == len(lost) * PER_BLOCK


PLACED = r"shard {root}.*/00000[12]\.tar, block \d+ at byte offset \d+ is damaged: its CRC32C is .* was recorded"
CUT = r"shard {root}/shards/000001\.tar has \d+ bytes where the manifest says \d+\."
CUT_OUTPUT = (
    r"shard {root} with shards/000001\.tar, block \d+ at byte offset \d+, can't be read: the command ended well after "
    r"\d+ bytes, but the file has \d+\."
)
INDEX = r"the block index {root}.*/000001\.idx is (missing|not the one the manifest names)"
STOPS = {
    "header": r"shard {root}.*/000001\.tar, block 5: a tar header, .* from byte offset 5268 on, is not as written",
    **dict.fromkeys(("payload", "look-ahead", "zeroed", "duplicated", "swapped"), PLACED),
    **{name: CUT for name in CASES if name.startswith("cut")},
    "missing": r"shard {root}/shards/000001\.tar is missing: the manifest lists it with 1536 tokens\.",
    "no index": INDEX,
    "foreign index": INDEX,
}
COMMAND_STOPS = {
    **{name: CUT_OUTPUT for name in CASES if name.startswith("cut")},
    "missing": r"{root} with shards/000001\.tar: the command ended .*No such file .* \(wanted for block \d+ at "
    r"byte offset \d+\)\..* If the file is not there: Look what the command {root} does, and restore there",
    "no index": r"{root} with shards/000001\.idx: the command ended .*No such file .* \(wanted for block \d+ at "
    r"byte offset \d+\)\..* If the file is not there: Write shards/000001\.idx again",
}
"""What a command can't know."""


@pytest.mark.parametrize(("name", "bench"), CELLS, indirect=["bench"])
def test_stop_says_what_is_wrong_before_a_wrong_token_is_handed_out(name: str, bench: Bench, whole: Path) -> None:
    """Shard, block and byte, cause, what to do, and that `hole` would go on, wherever the shard lies."""
    case = CASES[name]
    undamaged = list(bench.steps(TokenSource(whole, "web", "train", SEQ), "stop"))
    case.damage(shard_path(bench.folder, "000001"))
    piped = bench.root.startswith("pipe:")
    harmless = name == "header" and bench.in_pieces
    handed_out: list[Step] = []

    def run() -> None:
        source = bench.source("stop")
        handed_out.extend(bench.steps(source, "stop"))

    if harmless:
        run()
        assert len(handed_out) == len(undamaged)
    else:
        with pytest.raises(DataError) as raised:
            run()
        message = str(raised.value)
        expected = (STOPS | COMMAND_STOPS if piped else STOPS)[name].replace("{root}", re.escape(bench.root))
        assert re.match(expected, message), message
        assert re.search(
            r"restore there what is wrong|then restore what is wrong from a copy|--rebuild-sidecars", message
        )
        assert message.endswith(HOLES_ADVICE)
    for before, after in zip(undamaged, handed_out, strict=False):
        assert all(torch.equal(a.rows, b.rows) for a, b in zip(before.micro_batches, after.micro_batches, strict=True))


@pytest.mark.parametrize("bench", ["http", "http windowed", "pipe"], indirect=True)
@pytest.mark.parametrize("name", ["payload", "cut in a payload", "missing", "swapped", "no index"])
def test_what_the_cache_of_the_node_holds_is_not_lost(name: str, bench: Bench) -> None:
    before = list(bench.steps(bench.source("stop"), "stop"))
    CASES[name].damage(shard_path(bench.folder, "000001"))
    source = bench.source("hole")
    assert bool(source.unusable) == (name in ("cut in a payload", "missing") and source.root.startswith("http"))
    for one, two in zip(before, bench.steps(source, "hole"), strict=True):
        assert two.damage == ()
        assert all(torch.equal(a.rows, b.rows) for a, b in zip(one.micro_batches, two.micro_batches, strict=True))


def test_an_evaluation_counts_its_damaged_sequences_and_masks_them(bench: Bench) -> None:
    whole = bench.source("stop", "heldout").read(np.arange(BLOCKS * PER_BLOCK))
    shutil.rmtree(bench.storage.cache.folder or "", ignore_errors=True)
    flip(shard_path(bench.folder, "000003"), LAYOUT.data_offset(2) + 9)
    for rank in range(2):
        loader = EvaluationLoader(
            bench.source("hole", "heldout"), rank=rank, world_size=2, micro_batch=5, on_damage="hole", name="text"
        )
        for _ in range(2):
            batches = list(loader)
            samples = torch.cat([batch.sample_ids for batch in batches]).tolist()
            wanted = [q for g in range(len(batches)) for q in range(g * 10 + rank * 5, g * 10 + rank * 5 + 5)]
            lost = [q for q in wanted if q // PER_BLOCK == 2]
            assert samples == [-1 if q in lost or q >= len(whole) else q for q in wanted]
            rows = torch.cat([batch.rows for batch in batches])
            assert all(np.array_equal(rows[k], whole[q]) for k, q in enumerate(samples) if q >= 0)
            assert [(hole.position, hole.sample, hole.source) for hole in loader.damage] == [
                (q, q, "text") for q in lost
            ]
        with pytest.raises(DataError, match=r"000003\.tar"):
            list(EvaluationLoader(bench.source("stop", "heldout"), rank=0, world_size=1, micro_batch=5))
    flip(shard_path(bench.folder, "000003"), LAYOUT.data_offset(0) + 9)
    shutil.rmtree(bench.storage.cache.folder or "", ignore_errors=True)
    filled = EvaluationLoader(
        bench.source("hole", "heldout"), rank=0, world_size=1, micro_batch=PER_BLOCK + 1, sequences=1, on_damage="hole"
    )
    list(filled)
    assert [hole.position for hole in filled.damage] == [0], "rows that only fill up are no damage"


def test_what_is_missing_is_named_at_the_start(bench: Bench) -> None:
    assert bench.source("hole").unusable == []
    for name, change in (("000001.tar", os.remove), ("000002.tar", lambda path: os.truncate(path, 5000))):
        change(bench.folder / "shards" / name)
    os.remove(bench.folder / "shards/000000.idx")
    if bench.root.startswith("pipe:"):  # a command can't say what there is
        assert bench.source("stop").unusable == []
        return
    tokens, size = bench.source("hole").shards.tokens[1], bench.source("hole").shards.bytes[2]
    lost = [
        f"shard {bench.root}/shards/000001.tar is missing: the manifest lists it with {tokens} tokens",
        f"shard {bench.root}/shards/000002.tar has 5000 bytes where the manifest says {size}",
    ]
    if not bench.source("hole").remote:
        mend = f"`pretrain-data verify --rebuild-sidecars {bench.root}` writes it again from the shard"
        lost.insert(0, f"the block index {bench.root}/shards/000000.idx is missing ({mend})")
    assert bench.source("hole").unusable == lost
    with pytest.raises(DataError, match=rf"^{re.escape('; '.join(lost))}\. .* data.on_damage=hole lets"):
        bench.source("stop")
    halves = [
        TokenSource(bench.root, "web", "train", SEQ, storage=bench.storage, share=(rank, 2), on_damage="hole").unusable
        for rank in range(2)
    ]
    assert halves == [[told for told in lost if "000001" not in told], [lost[-2]]]


def test_the_advice_about_a_block_index_fits_the_place_where_it_is_missing(bench: Bench) -> None:
    source = bench.source("stop")
    os.remove(shard_path(bench.folder, "000001").with_suffix(".idx"))
    with pytest.raises(DataError, match=r"000001\.idx.* data.on_damage=hole lets") as raised:
        source.read([BLOCKS * PER_BLOCK])
    if source.remote:
        told = r"`pretrain-data verify --rebuild-sidecars FOLDER`, where the data set is a folder or in a copy of it"
    else:
        told = rf"`pretrain-data verify --rebuild-sidecars {bench.folder}` to write it again from the shard"
    assert told in str(raised.value)
    assert raised.value.exit_code == (1 if bench.root.startswith("pipe:") else 2), "a command may do better next time"


def test_many_missing_files_are_counted_and_the_first_named(tmp_path: Path) -> None:
    content = {("web", "train"): [[5] * 10] * 12}
    write_token_dataset(tmp_path, content, block_tokens=BLOCK, documents_per_shard=1)
    for number in range(4):
        os.remove(shard_path(tmp_path, f"{number:06d}"))
        os.truncate(shard_path(tmp_path, f"{number + 4:06d}"), 100)
        os.remove(shard_path(tmp_path, f"{number + 8:06d}").with_suffix(".idx"))
    counts = r"and 7 more \(in all 4 missing, 4 of another size, 4 without block index\)\. Run `pretrain-data verify "
    with pytest.raises(DataError, match=counts) as raised:
        TokenSource(tmp_path, "web", "train", SEQ)
    assert len(re.findall(r"is missing|has 100 bytes", str(raised.value))) == 5
