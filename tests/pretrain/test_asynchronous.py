"""Saving beside the training: the same bytes as a save that is waited for, and the same end when it fails."""

from __future__ import annotations

import io
import threading
import time
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.checkpoint import CheckpointError, CheckpointStore, intact
from pretrain.checkpoint.beside import Beside, Parts
from pretrain.config import CheckpointSettings
from pretrain.distributed import Distributed
from pretrain.engine.host_copies import HostCopies
from tests.ranks import run_on_ranks

from .steps import VOCABULARY, EngineRun, tiny_config

Pair = namedtuple("Pair", "first second")


class Anything:
    """An object of a library's, with state of its own."""

    def __init__(self) -> None:
        self.scale, self.names = 2.0, ["a", "b"]


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def awkward_content() -> dict[str, Any]:
    """What a copy might write in other bytes: shared storages and objects, views, attributes, kinds of tensors."""
    flat = torch.randn(40, dtype=torch.bfloat16)
    module = OrderedDict(view=flat[3:9].view(2, 3).t(), again=flat[3:9], rest=flat)
    module._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # torch sets it so
    shared = [1, 2, "x"]
    marked = torch.randn(4)
    marked.mark = {"of": [torch.randn(2)]}  # type: ignore[attr-defined]  # any attribute is saved
    return {
        "marked": marked,
        "module": module,
        "shared": [shared, shared, (shared, 3), Pair(shared, torch.tensor(1.5))],
        "shared again": shared,
        "kinds": [nn.Parameter(torch.randn(3)), torch.empty(0), torch.arange(3), torch.zeros((), requires_grad=True)],
        "object": Anything(),
        "plain": ({1: None}, frozenset({4}), torch.float16, torch.Size([2]), "text", 1e-3),
    }


def test_a_copy_pickles_to_the_same_bytes_and_shares_nothing() -> None:
    copies, content = HostCopies(torch.device("cpu")), awkward_content()
    before = pickled(content)
    copied = copies.copy(content)
    assert pickled(copied) == before
    with torch.no_grad():
        content["module"]["rest"].add_(1)
        content["kinds"][0].add_(1)
    content["shared"][0].append("later")
    content["object"].names.append("later")
    assert pickled(copied) == before


def test_buffers_are_used_again() -> None:
    copies = HostCopies(torch.device("cpu"))
    for value in (1.0, 2.0):
        copies.restart()
        copied = copies.copy([torch.full((100,), value), torch.full((100,), value), torch.zeros(7)])
        assert copied[0][0] == copied[1][0] == value
        assert copies.bytes() == 2 * 400 + 28


def parts(log: list[str]) -> Parts[str]:
    log.append("start")
    got = yield lambda: "one"
    log.append(got)
    got = yield lambda: "two"
    log.append(got)
    return "done"


def test_work_without_a_thread_is_done_where_it_comes_up() -> None:
    log: list[str] = []
    work = Beside(parts(log), None)
    assert (log, work.busy) == (["start"], False)
    assert not work.advance()
    assert work.finish() == "done"
    assert log == ["start", "one", "two"]


class Gate:
    """Holds every ``torch.save`` of another thread until it is opened."""

    def __init__(self) -> None:
        self._open, self._save, self._main = threading.Event(), torch.save, threading.get_ident()

    def __enter__(self) -> Gate:
        def held(*arguments: Any, **options: Any) -> None:
            if threading.get_ident() != self._main:
                assert self._open.wait(60)
            self._save(*arguments, **options)

        torch.save = held  # type: ignore[assignment]  # held up on purpose
        return self

    def open(self) -> None:
        self._open.set()

    def __exit__(self, *error: Any) -> None:
        torch.save = self._save  # type: ignore[assignment]  # torch's own again


def hashes(path: Path) -> dict[str, str]:
    return {file.path: file.sha256 for file in intact(path)}


def published(store: CheckpointStore, ranks: Distributed) -> Path:
    """What the trainer does between steps, until the checkpoint is there."""
    for _ in range(6000):
        if not any(ranks.gather_objects(store.busy)) and (saved := store.advance_save()):
            return saved.path
        time.sleep(0.01)
    raise AssertionError("never published")


def every_stage(root: Path) -> None:
    from launch.preflight.memory import host_copies
    from pretrain.distributed import start
    from pretrain.engine.layout import read_layout

    ranks = start(60)
    cases = [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
    for number, (stage, precision) in enumerate(cases):
        engine = {"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
        run = EngineRun(tiny_config(engine=engine, training={"precision": precision}), ranks)
        for step in range(2):
            run.step(step)
        waited, beside = (
            CheckpointStore(
                root / f"{number}_{name}", CheckpointSettings(every_steps=1, keep_last=1, asynchronous=later), ranks
            )
            for name, later in (("waited", False), ("beside", True))
        )
        expected = hashes(waited.save(run.engine, {"step": 1}))
        with Gate() as gate:
            beside.begin_save(run.engine, {"step": 1})
            assert beside.busy
            run.step(2)  # training goes on, the copy does not
            assert not (root / f"{number}_beside" / "step_000000001").exists()
            gate.open()
            path = published(beside, ranks)
        assert not beside.saving
        assert hashes(path) == expected
        held = run.engine.checkpoints._files._copies.bytes()
        foreseen = host_copies(run.config, VOCABULARY, ranks.world_size)[ranks.rank]
        assert held == pytest.approx(foreseen, abs=200), "what a preflight tells, but for counts of steps"
        read_layout(path)
        # a second one, into the same buffers, begun while the first might still be written; the first is removed
        expected = hashes(waited.save(run.engine, {"step": 2}))
        beside.begin_save(run.engine, {"step": 2})
        beside.begin_save(run.engine, {"step": 3})
        assert hashes(path.with_name("step_000000002")) == expected
        beside.finish_save()
        ranks.barrier()
        assert [found.name for found in (root / f"{number}_beside").iterdir()] == ["step_000000003"]
        ranks.barrier()
    failures(root, run, ranks)


def failures(root: Path, run: EngineRun, ranks: Distributed) -> None:
    """Whatever a rank can't write, all raise the same error at the same place, and the checkpoint before stays."""
    from .test_checkpoint import failing_fsync

    store = CheckpointStore(root / "fails", CheckpointSettings(every_steps=1, asynchronous=True), ranks)
    first = store.save(run.engine, {"step": 1})
    for victim, part in ((1, "optim_states.pt"), (1, "rank_00001.pt"), (0, "MANIFEST.json")):
        with failing_fsync(part, ranks.rank == victim):
            store.begin_save(run.engine, {"step": 2})
            with pytest.raises(CheckpointError, match=rf"step_000000002 could not be saved .*rank {victim}: No space"):
                published(store, ranks)
        assert not store.saving
        assert store.finish_save() is None
        ranks.barrier()
        assert [path.name for path in (root / "fails").iterdir()] == ["step_000000001"]
        assert intact(first)
        ranks.barrier()
    assert intact(store.save(run.engine, {"step": 2}))


def test_every_stage_writes_the_bytes_of_a_save_that_is_waited_for(tmp_path: Path) -> None:
    run_on_ranks(every_stage, 2, tmp_path)
