"""Everything but kills that may befall a run: it ends as the undisturbed one, or stops with the right message.

Each case is a function that raises AssertionError where it is otherwise. What a disk does is made by the calls that
reach it: ``os.fsync`` and ``os.mkdir`` of the ranks answer as a full, a read-only or a slow one would.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import complete_checkpoints
from pretrain.monitor import read_attempts
from pretrain.objective import Objective

from .forked import RANKS, Attempt, attempt
from .kills import STEPS, Kills
from .places import Kill, arm

SUCCESS = (0,) * RANKS


class Disturbances:
    """The cases, of runs beside those of ``kills``."""

    def __init__(self, kills: Kills, stage: int, asynchronous: bool) -> None:
        self._kills, self._stage, self._asynchronous = kills, stage, asynchronous

    def _config(self, name: str) -> Path:
        return self._kills.config(name, self._stage, self._asynchronous)

    def _ends_equal(self, name: str, done: Attempt | None = None) -> None:
        done = done or attempt(self._config(name))
        assert done.codes == SUCCESS, done.log
        assert self._kills.outcome(name) == self._kills.reference(self._stage), f"{name} ends otherwise"

    def _killed(self, name: str, call: int = 8) -> Path:
        """A run killed in a step after two saves; its newest checkpoint."""
        ended = attempt(self._config(name), prepare=lambda rank: arm(Kill("step", 1, call, 0.0)) if rank else None)
        assert ended.killed, ended.log
        return complete_checkpoints(self._kills.runs.run_folder(name) / "checkpoints")[-1]

    def _stops(self, name: str, prepare: Callable[[int], object], *words: str) -> None:
        """The run ends with the message, a checkpoint before is complete, and without the fault it goes on."""
        ended = attempt(self._config(name), prepare=prepare)
        assert ended.codes != SUCCESS, "nothing failed"
        message = read_attempts(self._kills.runs.run_folder(name))[-1].message
        for word in words:
            assert word in message, message
        self._ends_equal(name)

    def flipped_byte_in_a_checkpoint(self) -> None:
        path = self._killed("flipped")
        victim = max((path / "deepspeed").glob("*.pt"), key=lambda file: file.stat().st_size)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        self._goes_on_from_the_one_before("flipped", path, "SHA-256 differs")

    def truncated_checkpoint(self) -> None:
        path = self._killed("truncated")
        victim = next((path / "deepspeed").glob("*.pt"))
        os.truncate(victim, victim.stat().st_size // 2)
        self._goes_on_from_the_one_before("truncated", path, "bytes instead of")

    def _goes_on_from_the_one_before(self, name: str, damaged: Path, told: str) -> None:
        self._ends_equal(name)
        assert (damaged.parent / f"damaged_{damaged.name}").exists()
        events = [line for line in self._kills.runs.metrics(name) if line.get("event") == "damaged_checkpoint"]
        assert told in str(events[0]["message"])

    def deleted_shard(self) -> None:
        self._killed("shard")
        shard = next((self._kills.runs.data / "shards").glob("*.tar"))
        aside = shard.with_suffix(".aside")
        shard.rename(aside)
        ended = attempt(self._config("shard"))
        aside.rename(shard)
        assert set(ended.codes) == {2}, ended.log
        assert shard.name in ended.log
        self._ends_equal("shard")

    def full_disk(self) -> None:
        self._stops("full", lambda rank: failing(errno.ENOSPC, rank), "could not be saved", "No space left on device")

    def read_only_disk(self) -> None:
        self._stops("readonly", lambda rank: failing(errno.EROFS, rank), "could not be saved", "Read-only file system")

    def slow_disk(self) -> None:
        self._ends_equal("slow", attempt(self._config("slow"), prepare=lambda rank: slow_disk()))

    def clock_jump(self) -> None:
        self._ends_equal("clock", attempt(self._config("clock"), prepare=lambda rank: jumping_clock()))

    def batch_of_nan(self) -> None:
        config, stopping = self._config("nan"), ["stability.non_finite=stop"]
        ended = attempt(config, stopping, prepare=lambda rank: poison(position=40))
        assert ended.codes != SUCCESS, "nothing failed"
        stopped = read_attempts(self._kills.runs.run_folder("nan"))[-1]
        assert (stopped.reason, stopped.last_step) == ("non_finite", 5), stopped.message
        assert "at positions 40 to 47" in stopped.message, stopped.message
        self._ends_equal("nan")

    def stopped_and_continued(self) -> None:
        def stop_a_while(pids: list[int]) -> None:
            metrics = self._kills.runs.run_folder("stopped") / "metrics.jsonl"
            for _ in range(6000):
                if metrics.exists() and metrics.read_bytes().count(b"\n") >= 2:
                    break
                time.sleep(0.01)
            os.kill(pids[1], signal.SIGSTOP)
            time.sleep(2)
            os.kill(pids[1], signal.SIGCONT)

        self._ends_equal("stopped", attempt(self._config("stopped"), meanwhile=stop_a_while))

    def all(self) -> dict[str, Callable[[], None]]:
        cases = (
            self.flipped_byte_in_a_checkpoint,
            self.truncated_checkpoint,
            self.deleted_shard,
            self.full_disk,
            self.read_only_disk,
            self.slow_disk,
            self.clock_jump,
            self.batch_of_nan,
            self.stopped_and_continued,
        )
        return {case.__name__.replace("_", " "): case for case in cases}


def failing(number: int, rank: int) -> None:
    """Rank 0's disk lets nothing of the engine's be flushed, from the second or third save on."""
    fsync, saves = os.fsync, 0

    def refusing(descriptor: int) -> None:
        nonlocal saves
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if ".saving_" in path and path.endswith("_states.pt"):
            saves += 1
            if saves > 3:  # one save has one or two such files
                raise OSError(number, os.strerror(number), path)
        fsync(descriptor)

    if rank == 0:
        os.fsync = refusing


def slow_disk() -> None:
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.05)
        fsync(descriptor)

    os.fsync = slow


def jumping_clock() -> None:
    """The wall clock is set a day ahead, and two days back, in the middle of the run."""
    now, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return now() + (0 if calls < STEPS // 3 else 86_400 if calls < STEPS else -86_400)

    time.time = jumping


def poison(position: int) -> None:
    """The logits of the sequence at this position of the run are NaN, and so is its gradient."""
    micro_step = Objective.micro_step

    def poisoned(self: Objective, logits: torch.Tensor, batch: Any, *routing: Any) -> Any:
        factor = torch.where(batch.run_positions == position, torch.nan, 1.0)[:, None, None]
        return micro_step(self, logits * factor, batch, *routing)

    Objective.micro_step = poisoned  # type: ignore[method-assign]
