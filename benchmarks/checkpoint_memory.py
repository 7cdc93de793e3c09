"""What a rank's memory takes beyond its engine while a checkpoint is saved, and loaded on another number of ranks.

    python benchmarks/checkpoint_memory.py [--layers 14] [--save]

A decoder of 197 million parameters (2.4 GB of fp32 weights and moments) in bf16 at ZeRO 3: built, stepped once and
saved on four ranks with gloo, then loaded by name on two, into an engine of their own, at ZeRO 3 and at ZeRO 2. Peaks
are of the process's anonymous memory, sampled every millisecond: what mapped files take is the page cache's. ``build``
is until the engine stands, ``save`` and ``load`` are beyond what was held before them, ``..._held`` is what they leave:
a load makes the optimizer's moments. Limit (exit code 1 beyond it): what a rank takes for the time of a save, or of a
load at ZeRO 3, is a hundredth of the checkpoint. At ZeRO 2, where every rank has all weights in bf16, a load gathers
them once more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from data_pipeline.batches import make_batch
from data_pipeline.settings import build_settings
from pretrain.config import Config
from pretrain.distributed import finish, start
from pretrain.engine import Engine
from pretrain.model import count_parameters
from pretrain.objective import Objective

VOCABULARY, LENGTH, HIDDEN = 8192, 32, 1024
GROUPS = {"saved": (4, 3), "loaded": (2, 3), "loaded at ZeRO 2": (2, 2)}
"""Ranks and ZeRO stage of each group of processes."""
LIMIT = 0.01
RESULT = Path(__file__).parent / "results" / "checkpoint_memory.json"


def settings(ranks: int, stage: int, layers: int) -> Config:
    content = {
        "run": {"name": "benchmark"},
        "data": {"sources": {"text": {"path": "unused"}}, "seq_len": LENGTH},
        "model": {
            "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "layers": layers, "heads": 16, "intermediate_size": 2816,
        },
        "training": {"steps": 10, "global_batch": ranks, "micro_batch": 1, "precision": "bf16"},
        "engine": {"zero_stage": stage},
    }  # fmt: skip
    return build_settings(Config, content, "benchmark")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak(found: dict[str, int], name: str) -> Iterator[None]:
    """Put into ``found`` what the body takes at its peak, and what it leaves held, beyond what was held before."""
    before, most, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    done.set()
    watcher.join()
    after = anonymous_bytes()
    found[name], found[f"{name}_held"] = max(most, after) - before, after - before


def measure(group: str, folder: Path, layers: int) -> None:
    """In each process of a group."""
    ranks = start(1800)
    config = settings(*GROUPS[group], layers)
    found: dict[str, int] = {}
    with peak(found, "build"):
        engine = Engine(config, VOCABULARY, ranks, empty=group != "saved")
    if group == "saved":
        objective = Objective(config.objective, 1, ranks)
        rows = np.random.default_rng(ranks.rank).integers(4, VOCABULARY, (1, LENGTH + 1)).astype(np.uint16)
        batch = make_batch(rows, 2, np.zeros(1, np.int64), np.arange(1), np.arange(1))
        engine.begin_step(1)
        objective.begin_step(0, [batch], None)
        engine.backward(objective.micro_step(engine.training_forward(batch).logits, batch))
        engine.step(1e-4)
        with peak(found, "save"):
            engine.save(folder)
    else:
        with peak(found, "load"):
            engine.load(folder)
    everyone = ranks.gather_objects(found)
    if ranks.rank == 0:
        print(json.dumps(everyone), flush=True)
    finish(0, together=True)


def run(group: str, folder: Path, layers: int) -> list[dict[str, int]]:
    ranks, _ = GROUPS[group]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    done = subprocess.run(
        [*command, "--group", group, "--folder", str(folder), "--layers", str(layers)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: list[dict[str, int]] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.group is not None:
        return measure(arguments.group, arguments.folder, arguments.layers)
    count = count_parameters(settings(1, 0, arguments.layers).model, VOCABULARY).total
    with tempfile.TemporaryDirectory() as place:
        groups = {group: run(group, Path(place), arguments.layers) for group in GROUPS}
        written = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    beyond = {
        "save": max(rank["save"] for rank in groups["saved"]) / written,
        **{
            group: max(rank["load"] - rank["load_held"] for rank in groups[group]) / written
            for group in list(GROUPS)[1:]
        },
    }
    result: dict[str, Any] = {
        "parameters": count,
        "checkpoint_bytes": written,
        "bytes_of_each_rank": groups,
        "beyond_what_is_held": {name: round(share, 4) for name, share in beyond.items()},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if arguments.save:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(f"over the limit of {LIMIT:.0%}" if max(beyond["save"], beyond["loaded"]) > LIMIT else 0)


if __name__ == "__main__":
    main()
