"""Law 4: a checkpoint is complete or invisible, found by looking at it, and never lost by a clean-up."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError, HeadraceError, UserError
from pretrain.checkpoint import CheckpointError, CheckpointStore, complete_checkpoints, intact, read_state, store
from pretrain.checkpoint.manifest import FileRecord, problems, read_manifest, record_file, write_manifest
from pretrain.checkpoint.random_state import random_states, restore_random_states, seed_generators
from pretrain.config import CheckpointSettings
from tests.ranks import run_on_ranks

from .steps import VOCABULARY, micro_batches, tiny_config


def make_checkpoint(folder: Path, step: int) -> Path:
    """A complete checkpoint of two small files, without an engine."""
    path = folder / f"step_{step:09d}"
    (path / "deepspeed").mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"step": step}))
    (path / "deepspeed" / "weights.pt").write_bytes(bytes(range(200)))
    write_manifest(path, [record_file(path, path / "state.json"), record_file(path, path / "deepspeed/weights.pt")])
    return path


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_manifest_records_every_file(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 4)
    files = intact(path)
    assert [(file.path, file.bytes) for file in files] == [("deepspeed/weights.pt", 200), ("state.json", 11)]
    # sha256 of the bytes 0 to 199, by coreutils' sha256sum
    assert files[0].sha256 == "1901da1c9f699b48f6b2636e65cbf73abf99d0441ef67f5c540a42f7051dec6f"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (Path.unlink, "weights.pt can't be read: No such file or directory"),
        (cut_short, "weights.pt has 199 bytes instead of 200"),
        (flip_byte, r"weights.pt has other content than when it was saved \(SHA-256 differs\)"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm: Any, told: str) -> None:
    path = make_checkpoint(tmp_path, 4)
    harm(path / "deepspeed" / "weights.pt")
    with pytest.raises(DataError, match=told):
        intact(path)


def test_a_flipped_byte_is_only_seen_by_reading(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 4)
    files = read_manifest(path)
    assert files is not None
    flip_byte(path / "state.json")
    assert problems(path, files, hashes=False) == []
    assert len(problems(path, files, hashes=True)) == 1


@pytest.mark.parametrize("content", [None, b"", b'{"files": [', b"[]", b'{"files": [{"path": "a"}]}', b"\xff\xfe"])
def test_without_a_readable_manifest_it_is_no_checkpoint(tmp_path: Path, content: bytes | None) -> None:
    path = make_checkpoint(tmp_path, 4)
    if content is None:
        (path / "MANIFEST.json").unlink()
    else:
        (path / "MANIFEST.json").write_bytes(content)
    assert read_manifest(path) is None
    with pytest.raises(UserError, match=rf"{path} is no complete checkpoint: it has no readable MANIFEST\.json"):
        intact(path)
    assert complete_checkpoints(tmp_path) == []


def test_files_beside_the_recorded_ones_do_no_harm(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 4)
    (path / "notes.txt").write_text("the good one")
    assert len(intact(path)) == 2
    assert complete_checkpoints(tmp_path) == [path]


def test_complete_checkpoints_by_rising_step(tmp_path: Path) -> None:
    whole = [make_checkpoint(tmp_path, step) for step in (1000, 2, 30)]
    cut_short(make_checkpoint(tmp_path, 40) / "state.json")
    (make_checkpoint(tmp_path, 50) / "MANIFEST.json").unlink()
    for step, name in ((60, ".saving_step_000000060"), (70, "damaged_step_000000070"), (80, "step_80"), (90, "last")):
        make_checkpoint(tmp_path / "elsewhere", step).rename(tmp_path / name)
    assert complete_checkpoints(tmp_path) == [whole[1], whole[2], whole[0]]


def test_state_that_cant_be_read(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match=rf"{tmp_path}/state\.json can't be read: .*Is {tmp_path} a checkpoint of Head"):
        read_state(tmp_path)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_random_states_come_back() -> None:
    seed_generators(3, rank=1)
    first = draw()
    states = random_states()
    second = draw()
    restore_random_states(states)
    assert draw() == second
    seed_generators(3, rank=1)
    assert draw() == first
    for other in ((4, 1), (3, 0)):
        seed_generators(*other)
        assert all(one != two for one, two in zip(draw(), first, strict=True))


class Bench:
    """A real engine and a store, on one rank: what the cases below work with."""

    def __init__(self, root: Path) -> None:
        from pretrain.distributed import start
        from pretrain.engine import Engine
        from pretrain.objective import Objective

        config = tiny_config(engine={"zero_stage": 1})
        self.root = root
        self.ranks = start(60)
        self.engine = Engine(config, VOCABULARY, self.ranks)
        self.objective = Objective(config.objective, 2, self.ranks)

    def store(self, name: str, keep_last: int = 2, keep_every: int | None = None) -> CheckpointStore:
        settings = CheckpointSettings(every_steps=1, keep_last=keep_last, keep_every=keep_every)
        return CheckpointStore(self.root / name, settings, self.ranks)

    def step(self, number: int) -> None:
        batches = micro_batches(number, self.ranks, 1)
        self.engine.begin_step(len(batches))
        self.objective.begin_step(number, batches)
        for batch in batches:
            self.engine.backward(self.objective.micro_step(self.engine.forward(batch), batch))
        self.engine.step(1e-3)
        self.objective.end_step()

    def names(self, name: str) -> list[str]:
        self.ranks.barrier()
        found = sorted(path.name.replace("step_00000000", "") for path in (self.root / name).iterdir())
        self.ranks.barrier()
        return found

    def on_rank_0(self, action: Any, *arguments: Any) -> None:
        if self.ranks.rank == 0:
            action(*arguments)
        self.ranks.barrier()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saves_and_loads(bench: Bench) -> None:
    store = bench.store("loads")
    assert store.find() == (None, [])
    seed_generators(5, bench.ranks.rank)
    bench.step(0)
    path = store.save(bench.engine, {"step": 1, "mark": "here"})
    assert path == bench.root / "loads" / "step_000000001"
    recorded = {file.path for file in intact(path)}
    on_disk = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert recorded == on_disk
    assert {f"rank_{rank:05d}.pt" for rank in range(bench.ranks.world_size)} < recorded
    assert read_state(path) == {"step": 1, "mark": "here"}
    saved, drawn = bench.engine.full_parameters(), draw()
    assert len(set(bench.ranks.gather_objects(drawn))) == bench.ranks.world_size
    bench.step(1)
    after = bench.engine.full_parameters()
    assert not same(after, saved)
    assert store.find() == (path, [])
    store.load(path, bench.engine)
    assert same(bench.engine.full_parameters(), saved)
    assert draw() == drawn
    bench.step(1)
    assert same(bench.engine.full_parameters(), after)  # so the optimizer's moments came back too


def keeps_by_rule(bench: Bench) -> None:
    store = bench.store("keeps", keep_last=2, keep_every=4)
    for step in range(1, 8):
        path = store.save(bench.engine, {"step": step})
        if step == 6:
            bench.on_rank_0(cut_short, path / "state.json")
    assert bench.names("keeps") == ["4", "5", "6", "7"]  # 6 is broken and counts as none of the last two
    bench.ranks.barrier()
    only = bench.store("only", keep_last=1)
    for step in (1, 2):
        only.save(bench.engine, {"step": step})
    assert bench.names("only") == ["2"]


def damaged_ones_are_told_and_set_aside(bench: Bench) -> None:
    store = bench.store("damaged", keep_last=9)
    paths = [store.save(bench.engine, {"step": step}) for step in range(1, 6)]
    bench.on_rank_0(flip_byte, next((paths[1] / "deepspeed").glob("*optim_states.pt")))
    bench.on_rank_0(cut_short, paths[2] / "state.json")
    bench.on_rank_0((paths[3] / "MANIFEST.json").write_bytes, b"{")
    bench.on_rank_0((paths[4] / "MANIFEST.json").unlink)  # an interrupted removal: no checkpoint, nothing to tell
    found, told = store.find()
    assert found == paths[0]
    assert len(told) == 3
    assert told[0] == f"{paths[3]}/MANIFEST.json can't be read as it was saved"
    assert told[1].startswith(f"{paths[2]}/state.json has ")
    assert told[2].endswith("_optim_states.pt has other content than when it was saved (SHA-256 differs)")
    assert bench.names("damaged") == ["1", "5", "damaged_2", "damaged_3", "damaged_4"]
    assert store.save(bench.engine, {"step": 5}) == paths[4]
    assert intact(paths[4])
    store.save(bench.engine, {"step": 2})
    bench.on_rank_0(shutil.rmtree, paths[4])
    bench.on_rank_0(cut_short, paths[1] / "state.json")
    assert store.find()[0] == paths[0]
    assert bench.names("damaged") == ["1", "damaged_2", "damaged_2_2", "damaged_3", "damaged_4"]


def only_damaged_ones_are_an_error(bench: Bench) -> None:
    """Never a silent start from step 0."""
    for name, harm in (("flipped", flip_byte), ("short", cut_short), ("missing", Path.unlink)):
        store = bench.store(name)
        path = store.save(bench.engine, {"step": 3})
        bench.on_rank_0(harm, path / "state.json")
        with pytest.raises(DataError, match=rf"every checkpoint below {bench.root / name} is damaged: .*state\.json"):
            store.find()
        assert bench.names(name) == ["3"]


def leftovers_are_removed(bench: Bench) -> None:
    store = bench.store("leftovers")
    path = store.save(bench.engine, {"step": 3})
    for name in (".saving_step_000000004", ".deleting_step_000000001", "damaged_step_000000002"):
        bench.on_rank_0((path.parent / name / "deepspeed").mkdir, 0o755, True)
    bench.store("leftovers")
    assert bench.names("leftovers") == ["3", "damaged_2"]


@contextmanager
def failing_fsync(part: str, wanted: bool) -> Iterator[None]:
    """Flushing a file whose path holds ``part`` fails, as on a full disk."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if part in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        fsync(descriptor)

    if wanted:
        os.fsync = failing
    try:
        yield
    finally:
        os.fsync = fsync


def one_rank_fails_all_raise(bench: Bench) -> None:
    store = bench.store("fails")
    first = store.save(bench.engine, {"step": 1})
    last = bench.ranks.world_size - 1
    cases = [(last, "optim_states.pt"), (last, f"rank_{last:05d}.pt"), (0, "state.json"), (0, "MANIFEST.json")]
    for victim, part in cases:
        with (
            failing_fsync(part, bench.ranks.rank == victim),
            pytest.raises(
                CheckpointError,
                match=rf"^checkpoint step_000000002 could not be saved below {bench.root}/fails: "
                rf"rank {victim}: No space left on device \([^;]*{part}[^;]*\)\. "
                "The complete checkpoint step_000000001 is untouched; mend the disk",
            ),
        ):
            store.save(bench.engine, {"step": 2})
        assert bench.names("fails") == ["1"]
        assert intact(first)
    assert intact(store.save(bench.engine, {"step": 2}))
    empty = bench.store("empty")
    with failing_fsync(".pt", bench.ranks.rank == last), pytest.raises(HeadraceError, match="no earlier checkpoint"):
        empty.save(bench.engine, {"step": 2})
    assert bench.names("empty") == []


def a_removal_that_fails_is_told_as_one(bench: Bench) -> None:
    keeper = bench.store("removal", keep_last=1)
    keeper.save(bench.engine, {"step": 1})
    removed, store.remove = store.remove, refuse
    with pytest.raises(
        CheckpointError,
        match=r"^a checkpoint that is no longer kept could not be removed .*rank 0: Stale file handle \(.*_0{8}1\)\. "
        "The complete checkpoint step_000000002 is untouched",
    ):
        keeper.save(bench.engine, {"step": 2})
    store.remove = removed
    assert bench.names("removal") == ["1", "2"]
    keeper.save(bench.engine, {"step": 3})
    assert bench.names("removal") == ["3"]


def refuse(path: Path) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def store_cases(root: Path) -> None:
    """On one rank: every case with one engine, each in a folder of its own."""
    bench = Bench(root)
    saves_and_loads(bench)
    keeps_by_rule(bench)
    damaged_ones_are_told_and_set_aside(bench)
    only_damaged_ones_are_an_error(bench)
    leftovers_are_removed(bench)
    one_rank_fails_all_raise(bench)
    a_removal_that_fails_is_told_as_one(bench)


@pytest.mark.parametrize("world_size", [1, 2])
def test_store(tmp_path: Path, world_size: int) -> None:
    run_on_ranks(store_cases, world_size, tmp_path)


def test_record_is_relative_to_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert record_file(tmp_path, tmp_path / "sub" / "file") == FileRecord("sub/file", 3, abc)
