"""Watches that steps end; when one does not, every rank leaves its stacks, the reason is recorded and the run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from data_pipeline.errors import EXIT_CRASH, HeadraceError
from data_pipeline.files import publish_json
from pretrain.config import ResilienceSettings
from pretrain.distributed import Distributed

from .account import Account, account_of, guilty, verdict

TICK_SECONDS = 0.5
ANSWER_SECONDS = 10.0
"""For the other ranks to see by themselves that the step takes too long; their steps began at the same time."""
STACK_SECONDS = 2.0
"""For a rank that does not answer to leave its stacks at a signal, which needs no interpreter's lock."""
STACKS_SIGNAL = signal.SIGUSR2
FEWEST_STEPS = 3
"""After which the usual time is known: the first one compiles and allocates."""


class HangError(HeadraceError):
    """No step ended for a multiple of the usual time."""

    def __init__(self, message: str, guilty: tuple[int, ...]) -> None:
        super().__init__(message)
        self.guilty = guilty
        """The ranks that the others wait for; none where that is not certain."""


class HangGuard:
    """Watches this rank's steps from a thread of its own.

    Between :meth:`begin_step` and the next call of it or :meth:`pause` there may pass no more than the larger of
    ``hang_seconds`` and ``hang_multiple`` times the median of the last 50 steps. Only time in which this process ran
    counts: one that was stopped and goes on has not waited for anybody, and a clock that is set changes nothing.

    Args:
        settings: how long is too long.
        folder: for what the ranks leave, ``FOLDER/rank_00000.txt`` and ``.json``.
        ranks: this process among its peers. The constructor is collective.
        end: called on one rank with the reason, records it.
    """

    def __init__(
        self, settings: ResilienceSettings, folder: Path, ranks: Distributed, end: Callable[[HangError], object]
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._ranks = ranks
        self._end = end
        self._host = socket.gethostname()
        self._peers: list[tuple[str, int]] = ranks.gather_objects((self._host, os.getpid()))
        self._steps: deque[float] = deque(maxlen=50)
        self._lock = threading.Lock()
        self._step: int | None = None
        self._began = 0.0
        self._waited = 0.0
        faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)  # stderr, whatever Python calls so
        if settings.hang_multiple is not None:
            threading.Thread(target=self._watch, name="hang-guard", daemon=True).start()

    def begin_step(self, step: int) -> None:
        """A step begins (and the one before has ended)."""
        with self._lock:
            self._note()
            self._step = step

    def pause(self) -> None:
        """The step has ended and what follows takes as long as it takes: an evaluation, a save, the end."""
        with self._lock:
            self._note()
            self._step = None

    def _note(self) -> None:
        now = time.monotonic()
        if self._step is not None:
            self._steps.append(now - self._began)
        self._began, self._waited = now, 0.0

    def limit(self) -> float | None:
        """Seconds that a step may take; None while that is not known."""
        if self._settings.hang_multiple is None or len(self._steps) < FEWEST_STEPS:
            return None
        return max(self._settings.hang_seconds, self._settings.hang_multiple * statistics.median(self._steps))

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            with self._lock:
                self._waited += min(now - before, 2 * TICK_SECONDS)
                limit, step = self.limit(), self._step
                hangs = step is not None and limit is not None and self._waited > limit
            before = now
            if hangs and step is not None:
                self._give_up(step)

    def _give_up(self, step: int) -> None:
        waited, usual = self._waited, statistics.median(self._steps)
        own = self._account(step)
        with contextlib.suppress(OSError):  # a run folder that hangs too must not keep the run from ending
            self._leave_traces(own)
        found = self._hear()
        silent = {rank: host for rank, (host, _) in enumerate(self._peers) if rank not in found}
        if own.rank == min(found):
            self._end(
                HangError(
                    f"no step ended for {waited:.0f} s, where one usually takes {usual:.3g} s: "
                    f"{verdict([found[rank] for rank in sorted(found)], silent)}. Stacks lie in {self._folder}"
                    f"{' and, of ranks that did not answer, in their stderr' if silent else ''}.",
                    guilty(list(found.values()), list(silent)),
                )
            )
        else:
            time.sleep(STACK_SECONDS)  # the first failure ends all ranks of a launcher: let the reason be recorded
        self._call(silent)
        self._kill(silent)
        os._exit(EXIT_CRASH)

    def _account(self, step: int) -> Account:
        return account_of(self._ranks.rank, self._host, step, self._ranks.device.type != "cpu")

    def _leave_traces(self, own: Account) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"rank_{own.rank:05d}"
        with (self._folder / f"{stem}.txt").open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        for name in ("_dump_fr_trace_json", "_dump_nccl_trace"):
            # torch's flight recorder, of the collectives of late; each of its builds has its own name for it
            if recorder := getattr(torch._C._distributed_c10d, name, None):
                content = recorder()
                suffix, data = ("json", content.encode()) if isinstance(content, str) else ("pickle", content)
                (self._folder / f"{stem}.flight.{suffix}").write_bytes(data)
        publish_json(self._folder / f"{stem}.json", dataclasses.asdict(own))

    def _hear(self) -> dict[int, Account]:
        """What the ranks say, by rank, waiting for those that still say nothing."""
        found = {self._ranks.rank: self._account(self._step or 0)}
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(found) < len(self._peers) and time.monotonic() < deadline:
            time.sleep(0.1)
            for rank in set(range(len(self._peers))) - found.keys():
                with contextlib.suppress(OSError, ValueError, TypeError):
                    path = self._folder / f"rank_{rank:05d}.json"
                    found[rank] = Account(**json.loads(path.read_bytes()))
        return found

    def _call(self, silent: dict[int, str]) -> None:
        """Let the silent ranks of this host leave their stacks, if they run at all."""
        self._signal(silent, STACKS_SIGNAL)
        if silent:
            time.sleep(STACK_SECONDS)

    def _kill(self, silent: dict[int, str]) -> None:
        """A stopped process takes no notice of a launcher that asks it to end, which may wait for it for days."""
        self._signal(silent, signal.SIGKILL)

    def _signal(self, silent: dict[int, str], number: signal.Signals) -> None:
        for rank, host in silent.items():
            if host == self._host:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(self._peers[rank][1], number)
