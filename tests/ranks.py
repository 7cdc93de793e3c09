"""Run a function on n ranks: real processes, a real gloo group."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 500) -> list[Any]:
    """``function(*arguments)`` on ``world_size`` fresh processes with torchrun's environment.

    Returns what each rank returned, in rank order. An exception of a rank fails the test with its traceback.
    """
    port = free_port()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(function, arguments, rank, world_size, port, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert not hung, f"ranks {hung} did not end within {timeout} s"
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of one node."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank(function: Callable[..., Any], arguments: Any, rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ.update(rank_environment(rank, world_size, port), OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    try:
        result = function(*arguments)
        (Path(folder) / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:  # noqa: BLE001  # whatever it is, the parent shows it and fails the test
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.stdout.flush()
        os._exit(1)
    from pretrain.distributed import finish

    finish(0, together=True)
