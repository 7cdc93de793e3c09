"""Processes for runs: forked from one that has imported torch and DeepSpeed already, where there is no GPU.

On CPUs the imports take longer than a small run. A process that has looked for GPUs must not be forked, so with one
each run's process imports for itself.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

import torch

_HANDLING = threading.Lock()
"""multiprocessing looks after all children whenever one is started, and two threads must not do that at once."""


def train_in_process(base: Path, arguments: Sequence[str], where: Path, log: Path, threads: int) -> int:
    """``pretrain train`` in a process of its own, from the folder ``where``; what it prints goes to ``log``.

    Returns:
        its exit code; negative: the signal that killed it.
    """
    context = multiprocessing.get_context("forkserver")
    if not torch.cuda.is_available():
        context.set_forkserver_preload(["studies.common.preloaded"])
    process = context.Process(target=_train, args=(base, list(arguments), where, log, threads))
    with _HANDLING:
        process.start()
    wait([process.sentinel])
    with _HANDLING:
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _train(base: Path, arguments: list[str], where: Path, log: Path, threads: int) -> NoReturn:
    from pretrain.run import run_training

    os.chdir(where)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    run_training(base, arguments)
