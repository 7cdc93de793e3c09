"""Claims: what two tasks must not do at the same time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import Share
from data_pipeline.prepare.claims import claim


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Real processes that begin in milliseconds: forked from one that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _claim_and_die(folder: Path, ready: Any) -> None:
    with claim(folder, "part 000001", Share(1, 2)):
        ready.set()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_claim_dies_with_its_process(tmp_path: Path, processes: ForkServerContext) -> None:
    ready = processes.Event()
    process = processes.Process(target=_claim_and_die, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with claim(tmp_path, "part 000001", Share(0, 2)):
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def _count_up(folder: Path, times: int) -> None:
    for _ in range(times):
        with claim(folder, "the counter", Share(), wait=True):
            path = folder / "count"
            value = int(path.read_text())
            path.write_text(str(value + 1))


def test_claims_exclude_each_other(tmp_path: Path, processes: ForkServerContext) -> None:
    """Also while their files are made and removed: the counter misses nothing."""
    (tmp_path / "count").write_text("0")
    running = [processes.Process(target=_count_up, args=(tmp_path, 60)) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert (tmp_path / "count").read_text() == "180"
