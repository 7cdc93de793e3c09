"""A full disk while saving: the run stops with the reason, the previous checkpoint survives, and it goes on from it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import complete_checkpoints, intact
from pretrain.monitor import read_attempts

from .runs import Runs


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of its own; mounting one needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@pytest.mark.slow
def test_the_previous_checkpoint_survives(runs: Runs, small_disk: Path) -> None:
    straight = runs.config("straight")
    assert runs.train(straight).returncode == 0
    one = sum(file.bytes for file in intact(runs.run_folder("straight") / "checkpoints" / "step_000000020"))

    full = runs.config("full", run={"name": "full", "folder": str(small_disk)})
    resize(small_disk, int(2.6 * one))
    failed = runs.train(full, timeout=90)
    assert failed.returncode != 0
    assert "checkpoint step_000000012 could not be saved below" in failed.stderr
    assert "No space left on device" in failed.stderr
    assert "The complete checkpoint step_000000008 is untouched" in failed.stderr
    stopped = read_attempts(small_disk / "full")[-1]
    assert (stopped.exit_code, stopped.last_step) == (1, 12)
    assert "No space left on device" in stopped.message
    checkpoints = small_disk / "full" / "checkpoints"
    assert [path.name for path in complete_checkpoints(checkpoints)] == ["step_000000004", "step_000000008"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000000004", "step_000000008"]

    resize(small_disk, 20 * one)
    resumed = runs.train(full)
    assert resumed.returncode == 0, resumed.stderr
    there = {file.path: file.sha256 for file in intact(checkpoints / "step_000000020") if file.path.endswith(".pt")}
    assert there == runs.state_hashes("straight", 20)
