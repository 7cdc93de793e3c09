"""Running jobs in worker processes, with a progress bar, so that nothing outlives the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from ..errors import HeadraceError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    processes: int | None,
    describe: str,
    unit: str,
    weight: Callable[[Job], int],
) -> list[Result]:
    """``[function(job) for job in jobs]`` in ``processes`` processes (``None``: as many as cores).

    The progress bar shows ``describe`` and counts ``weight(job)`` in ``unit``. An error of a job is raised after the
    running jobs have ended; jobs not yet begun are dropped.

    Raises:
        HeadraceError: a worker process died.
    """
    processes = min(processes or available_cores(), len(jobs))
    results: dict[int, Result] = {}
    interval = 0.1 if sys.stderr.isatty() else 10.0
    total = sum(weight(job) for job in jobs)
    with tqdm(total=total, desc=describe, unit=unit, unit_scale=True, mininterval=interval) as bar:
        completed = _here(function, jobs) if processes <= 1 else _in_processes(function, jobs, processes)
        for number, result in completed:
            results[number] = result
            bar.update(weight(jobs[number]))
    return [results[number] for number in range(len(jobs))]


def available_cores() -> int:
    """The cores this process may run on (a SLURM job often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here(function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
    for number, job in enumerate(jobs):
        yield number, function(job)


def _in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[tuple[int, Result]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker)
    waiting = iter(enumerate(jobs))
    running: dict[Future[Result], int] = {}
    try:
        while True:
            while len(running) < 2 * processes and (item := next(waiting, None)):
                with _interrupts_ignored():
                    running[pool.submit(function, item[1])] = item[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise HeadraceError(
            "a worker process was killed (often for lack of memory). Start the same command again: it continues; "
            "fewer `processes` or smaller `part_bytes` and `shard_tokens` need less memory."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started inside ignores Ctrl-C from its first instruction on: it is for the parent."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent has gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
