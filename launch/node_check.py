"""Is every node of a job fit to train? What each rank finds out about its node before training starts.

A rank checks its device's arithmetic and memory, the first rank of a node its file system, all together the network;
each writes down what it found after every stage, so that a rank that dies or hangs is known by what it did not write.
:mod:`launch.node_verdict` compares.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.files import publish_json
from pretrain.distributed import Distributed, finish, start

from .node_verdict import DEADLINE_SECONDS, STAGES

_FREE = 0.9
"""Part of a GPU's memory that has to be free: a process that an earlier job left behind takes more."""
_FILE_BYTES = 32 * 2**20
_PATTERN = 0x5A


def check_device(device: torch.device) -> dict[str, float]:
    """Speed of matrix products, in TFLOP/s.

    Raises:
        RuntimeError: two equal products differ in a bit, or are not finite.
    """
    size, dtype, seconds = (8192, torch.bfloat16, 1.0) if device.type == "cuda" else (512, torch.float32, 0.2)
    generator = torch.Generator(device).manual_seed(1)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    product = left @ right
    if not product.isfinite().all():
        raise RuntimeError("a product of finite matrices is not finite: the device computes wrongly")
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        again = left @ right
        if not torch.equal(again, product):  # waits for the device
            raise RuntimeError("the same product came out with other bits: the device computes wrongly")
        count += 1
    return {"tflops": count * 2 * size**3 / (time.perf_counter() - began) / 1e12}


def check_memory(device: torch.device) -> dict[str, float]:
    """Free memory in GB, which keeps what is written to it (on a CPU: 64 MB of it).

    Raises:
        RuntimeError: too much of a GPU's is taken, or some came back changed.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < _FREE * total:
            raise RuntimeError(f"{(total - free) / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB are taken by others")
        pieces = int(_FREE * free) // 2**30
        kept = [torch.full((2**30,), _PATTERN, dtype=torch.uint8, device=device) for _ in range(pieces)]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        kept = [torch.full((2**26,), _PATTERN, dtype=torch.uint8)]
    if not all(bool((piece == _PATTERN).all()) for piece in kept):
        raise RuntimeError("memory came back changed")
    return {"free_gb": free / 1e9}


def check_files(folder: Path) -> dict[str, float]:
    """Writing a file of 32 MB to disk and reading it back, in MB/s of both together.

    Raises:
        OSError: it could not.
        RuntimeError: it came back changed.
    """
    content, path = os.urandom(_FILE_BYTES), folder / f".node_check_{os.environ.get('RANK', '0')}"
    began = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(content).digest():
            raise RuntimeError(f"a file in {folder} came back changed")
    finally:
        path.unlink(missing_ok=True)
    return {"file_mb_per_s": 2 * _FILE_BYTES / 1e6 / (time.perf_counter() - began)}


def check_network(ranks: Distributed, node: int, nodes: int, ranks_per_node: int) -> dict[str, float]:
    """A sum over all ranks, then the first rank of each node exchanges data with those of the nodes beside it: in MB/s
    of the better of its two links, for a slow node has two slow ones and its neighbours one each.

    Raises:
        RuntimeError: a collective failed, or its result is wrong.
    """
    total = ranks.all_reduce(torch.full((2**18,), float(ranks.rank + 1), device=ranks.device))
    if not bool((total == ranks.world_size * (ranks.world_size + 1) / 2).all()):
        raise RuntimeError("a sum over all ranks came out wrong")
    best = 0.0
    if ranks.rank == node * ranks_per_node and nodes > 1:
        payload = torch.zeros((2**26 if ranks.device.type == "cuda" else 2**22) // 4, device=ranks.device)
        # in each round every node is in one link at most, so that links do not share its bandwidth
        links = [(one, (one + 1) % nodes) for one in range(nodes if nodes > 2 else 1)]
        rounds = [links[0 : nodes - 1 : 2], links[1 : nodes - 1 : 2], links[nodes - 1 :]] if nodes > 2 else [links]
        for pairs in rounds:
            for pair in (pair for pair in pairs if node in pair):
                other = pair[1 - pair.index(node)] * ranks_per_node
                best = max(best, _exchange(payload, other, first=node == pair[0]))
    ranks.barrier()
    return {"link_mb_per_s": best} if nodes > 1 and ranks.rank == node * ranks_per_node else {}


def _exchange(payload: torch.Tensor, other: int, first: bool) -> float:
    began, times = 0.0, 3
    for number in range(times + 1):
        if number == 1:  # the exchange before has made the connection
            began = time.perf_counter()
        for sends in (first, not first):
            (dist.send if sends else dist.recv)(payload, other)
        float(payload[0])
    return 2 * times * payload.nbytes / 1e6 / (time.perf_counter() - began)


def main(logs: Path, folder: Path) -> None:
    """Check this rank's share; write ``rank_NNNNN.json`` into ``logs``, again after each stage."""
    # a collective that waits for a rank that hangs can't be interrupted otherwise
    timer = threading.Timer(DEADLINE_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()
    rank, node, local_rank = (int(os.environ[name]) for name in ("RANK", "GROUP_RANK", "LOCAL_RANK"))
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    found: dict[str, Any] = {"rank": rank, "ranks_per_node": ranks_per_node, "done": [], "errors": {}, "measured": {}}
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def network() -> dict[str, float]:
        ranks = start(DEADLINE_SECONDS)
        return check_network(ranks, node, ranks.world_size // ranks_per_node, ranks_per_node)

    stages: dict[str, Callable[[], dict[str, float]]] = {
        "device": lambda: check_device(device),
        "memory": lambda: check_memory(device),
        "files": lambda: check_files(folder) if local_rank == 0 else {},
        "network": network,
    }
    for stage in STAGES:
        try:
            found["measured"].update(stages[stage]())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            found["errors"][stage] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        found["done"].append(stage)
        publish_json(logs / f"rank_{rank:05d}.json", found)
    timer.cancel()
    finish(0, together="network" not in found["errors"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
