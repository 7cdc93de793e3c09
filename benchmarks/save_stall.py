"""How long a save keeps the training waiting, synchronous and asynchronous, and what the copy alone takes.

    python benchmarks/save_stall.py [--saves 8] [--save] [--short]
    torchrun --standalone --nproc-per-node 2 benchmarks/save_stall.py

The 13M-parameter decoder of ``step_overhead.py`` at ZeRO 1, fp32, AdamW. ``stall`` is from the end of a step to the
start of the next one with a save between them; ``copy`` is the part of it in which the state is copied to the host's
memory. Limit (exit code 1 beyond it): what an asynchronous save keeps waiting beyond its copy is 10 % of
a usual step, in the median over the saves. The first save of each kind, which allocates, is told by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from step_overhead import MICRO, VOCABULARY, data, loader, settings

from pretrain.checkpoint import CheckpointStore
from pretrain.config import CheckpointSettings
from pretrain.distributed import Distributed, finish, start
from pretrain.engine import Engine
from pretrain.engine.host_copies import HostCopies
from pretrain.objective import Objective

LIMIT = 0.10
STEPS_BETWEEN = 6


class CopySeconds:
    """Adds up the time inside ``HostCopies.copy``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        copy = HostCopies.copy

        def timed(copies: HostCopies, content: Any) -> Any:
            started = time.perf_counter()
            copied = copy(copies, content)
            self.seconds += time.perf_counter() - started
            return copied

        HostCopies.copy = timed  # type: ignore[method-assign]  # timed where the engine calls it

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def measure_saves(
    step: Callable[[], None], engine: Engine, stores: dict[str, CheckpointStore], saves: int, ranks: Distributed
) -> dict[str, Any]:
    """Saves of both kinds in turn, with steps between them; all figures in seconds, of this rank."""
    copies = CopySeconds()
    usual: list[float] = []
    beside: list[float] = []
    stalls: dict[str, list[float]] = {name: [] for name in stores}
    copied: list[float] = []
    for _ in range(3):
        step()
    for number in range(saves + 1):
        for name, store in stores.items():
            ranks.barrier()
            started = time.perf_counter()
            store.begin_save(engine, {"step": number})
            if name == "synchronous":
                store.finish_save()
            stalls[name].append(time.perf_counter() - started)
            if name == "asynchronous":
                copied.append(copies.take())
            for _ in range(STEPS_BETWEEN):
                started = time.perf_counter()
                step()
                (beside if store.busy else usual).append(time.perf_counter() - started)
            store.finish_save()
    usual_step = statistics.median(usual)
    beyond = [stall - copy for stall, copy in zip(stalls["asynchronous"], copied, strict=True)]
    return {
        "usual_step": usual_step,
        "step_while_a_save_is_written": statistics.median(beside) if beside else None,
        "first_stall": {name: values[0] for name, values in stalls.items()},
        "stall": {name: statistics.median(values[1:]) for name, values in stalls.items()},
        "copy": statistics.median(copied[1:]),
        "beyond_the_copy": statistics.median(beyond[1:]),
        "beyond_the_copy_of_a_step": statistics.median(beyond[1:]) / usual_step,
    }


def measure(saves: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    ranks = start(600)
    config = settings(1, MICRO * ranks.world_size)
    with tempfile.TemporaryDirectory() as folder:
        order, source = data(Path(folder))
        batches = loader(order, source, MICRO * ranks.world_size, ranks)
        engine, objective = Engine(config, VOCABULARY, ranks), Objective(config.objective, 1, ranks)

        def step() -> None:
            micro_batches = batches.next_step().micro_batches
            engine.begin_step(len(micro_batches))
            objective.begin_step(0, micro_batches)
            for batch in micro_batches:
                engine.backward(objective.micro_step(engine.forward(batch), batch))
            engine.step(3e-4)
            objective.end_step()

        root = Path(ranks.broadcast_object(folder))
        stores = {
            name: CheckpointStore(
                root / name, CheckpointSettings(every_steps=1, keep_last=1, asynchronous=name == "asynchronous"), ranks
            )
            for name in ("synchronous", "asynchronous")
        }
        result = measure_saves(step, engine, stores, saves, ranks)
        ranks.barrier()
        newest = max((root / "asynchronous").glob("step_*"))
        written = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return {
        "saves": saves,
        "ranks": ranks.world_size,
        "checkpoint_bytes": written,
        **result,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a rank",
        "torch": torch.__version__,
        "vocabulary": VOCABULARY,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=8, help="measured saves of each kind")
    parser.add_argument("--short", action="store_true", help="one save, to see that it runs; fails nothing")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/save_stall_RANKS.json")
    arguments = parser.parse_args()
    result = measure(1 if arguments.short else arguments.saves)
    over = result["beyond_the_copy_of_a_step"] > LIMIT
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(result, indent=2))
        if arguments.save:
            path = Path(__file__).parent / f"results/save_stall_{result['ranks']}.json"
            path.write_text(json.dumps(result, indent=2) + "\n")
        if over:
            print(f"over the limit of {LIMIT:.0%} of a step")
    finish(1 if over and not arguments.short else 0, together=True)


if __name__ == "__main__":
    main()
