"""Ranks of ``pretrain train`` as forks of a process that has imported everything: an attempt costs no start-up."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import free_port, rank_environment

RANKS = 2
PATIENCE_SECONDS = 8.0
"""After the first rank has died: the others find the broken connection, or are killed, as torchrun would kill them."""
LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Attempt:
    """How the ranks ended, by their wait status: negative where a signal ended one."""

    codes: tuple[int, ...]
    log: str

    @property
    def killed(self) -> bool:
        return any(code in (-signal.SIGALRM, -signal.SIGKILL) for code in self.codes)


Prepare = Callable[[int], object]
"""Called in each rank, with its number, before the program starts."""


def attempt(
    config: Path,
    overrides: Sequence[str] = (),
    prepare: Prepare = lambda rank: None,
    meanwhile: Callable[[list[int]], object] = lambda pids: None,
    ranks: int = RANKS,
) -> Attempt:
    """Start the run, or go on with it, and wait until it ends.

    Args:
        meanwhile: called in this process, with the ranks' process ids, when they have been started.
    """
    port = free_port()
    logs = [config.with_suffix(f".rank{rank}.log") for rank in range(ranks)]
    pids = [_start(config, overrides, prepare, rank, ranks, port, logs[rank]) for rank in range(ranks)]
    try:
        meanwhile(pids)
        codes = _wait(pids)
    finally:
        for pid in pids:
            _kill(pid)
    return Attempt(tuple(codes), "\n".join(log.read_text(errors="replace") for log in logs))


def _start(
    config: Path, overrides: Sequence[str], prepare: Prepare, rank: int, ranks: int, port: int, log: Path
) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(rank_environment(rank, ranks, port), TORCHELASTIC_RESTART_COUNT="0")
        from pretrain.run import run_training

        prepare(rank)
        if os.environ.get("HEADRACE_FAULTS_MODULES"):
            _note_modules_at_end()
        run_training(config, overrides)
    finally:
        os._exit(99)


def _wait(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := _ended(pid)) is not None:
                codes[pid] = found
                if found:
                    deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    _kill(pid)
                    codes[pid] = -signal.SIGTERM  # as the launcher's end of the ranks that are left
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _note_modules_at_end() -> None:
    from pretrain import run

    finish = run.finish

    def noting(code: int, together: bool) -> None:
        Path(os.environ["HEADRACE_FAULTS_MODULES"]).write_text(json.dumps(sorted(sys.modules)))
        finish(code, together)

    run.finish = noting  # type: ignore[assignment]


def warm_up(config: Path, overrides: Sequence[str], notes: Path) -> Attempt:
    """A first attempt, after which this process imports what it has imported; it starts no thread."""
    from pretrain.engine.deepspeed_module import import_deepspeed
    from pretrain.run_folder import versions

    versions()
    os.environ["HEADRACE_FAULTS_MODULES"] = str(notes)
    done = attempt(config, overrides)
    del os.environ["HEADRACE_FAULTS_MODULES"]
    import_deepspeed()
    for name in json.loads(notes.read_text()):
        if name not in sys.modules and name.startswith(("torch", "deepspeed", "pretrain", "data_pipeline")):
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001  # names that only look like modules; each fork imports them by itself
                continue
    tasks = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    # pyarrow's allocator has one of its own, which is prepared for forks
    others = [name for name in tasks[1:] if name != "jemalloc_bg_thd"]
    assert not others, f"threads {others}: forks of this process might hang"
    return done
