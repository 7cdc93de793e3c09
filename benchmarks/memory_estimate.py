"""The memory estimate of `pretrain-launch preflight` against the peak that training reaches, on the CPU.

    python benchmarks/memory_estimate.py [--save]

Five configurations of a model of 34 million parameters on two ranks with gloo, each in processes of its own: two
optimizer steps of two micro-steps. Measured is the peak of the resident memory of rank 0 beyond what it was before the
engine was built (after a first engine of a tiny model, which loads all libraries), against the estimate without the
share of CUDA. The C library is told to give every freed tensor back at once (MALLOC_MMAP_THRESHOLD_): by its own rules
it keeps a tenth to a fifth more, by chance. On a CPU norms are not fused and the allocator differs: this says how far
the arithmetic is right, not what a GPU takes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from data_pipeline.batches import make_batch
from data_pipeline.settings import build_settings
from launch.preflight.memory import ERROR_BAR, estimate
from pretrain.config import Config
from pretrain.distributed import Distributed, finish, start
from pretrain.engine import Engine
from pretrain.objective import Objective

RANKS, VOCABULARY, LENGTH, MICRO, BUCKET = 2, 8192, 256, 2, 2_000_000
CASES = [(0, "fp32", "none"), (1, "fp32", "none"), (1, "bf16", "none"), (2, "bf16", "full"), (3, "bf16", "none")]
RESULT = Path(__file__).parent / "results" / "memory_estimate.json"


def settings(stage: int, precision: str, recompute: str, hidden: int = 512, layers: int = 8) -> Config:
    model = {"vocab_size": VOCABULARY, "hidden_size": hidden, "layers": layers, "heads": 8}
    engine: dict[str, Any] = {"zero_stage": stage}
    if stage:
        engine["bucket_elements"] = BUCKET
    if stage == 3:
        engine["persistence_threshold"] = 0
    content = {
        "run": {"name": "benchmark"},
        "data": {"sources": {"text": {"path": "unused"}}, "seq_len": LENGTH},
        "model": {**model, "intermediate_size": hidden * 8 // 3 // 8 * 8},
        "training": {
            "steps": 10, "global_batch": MICRO * RANKS * 2, "micro_batch": MICRO, "precision": precision,
            "activation_checkpointing": recompute,
        },
        "engine": engine,
    }  # fmt: skip
    return build_settings(Config, content, "benchmark")


def train(config: Config, ranks: Distributed) -> Engine:
    engine, objective = Engine(config, VOCABULARY, ranks), Objective(config.objective, 1, ranks)
    for step in range(2):
        rows = np.random.default_rng(step).integers(4, VOCABULARY, (MICRO, LENGTH + 1)).astype(np.uint16)
        rows[:, LENGTH // 2] = 2  # two documents in a sequence, so that a mask is made
        batch = make_batch(rows, 2, np.zeros(MICRO, np.int64), np.arange(MICRO), np.arange(MICRO))
        engine.begin_step(2)
        objective.begin_step(step, [batch, batch], None)
        for _ in range(2):
            engine.backward(objective.micro_step(engine.forward(batch), batch))
        engine.step(1e-4)
    return engine


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(number: int) -> None:
    ranks = start(300)
    train(settings(*CASES[number], hidden=32, layers=1), ranks)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    config = settings(*CASES[number])
    engine = train(config, ranks)
    if ranks.rank == 0:
        taken, found = resident("VmHWM") - before, estimate(config, VOCABULARY, RANKS)
        print(json.dumps({"measured": taken, "estimated": round(found.tensors)}), flush=True)
    del engine
    finish(0, together=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.number is not None:
        return measure(arguments.number)
    rows = []
    for number, (stage, precision, recompute) in enumerate(CASES):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        done = subprocess.run(
            [*command, __file__, "--number", str(number)],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        row["ratio"] = round(row["estimated"] / row["measured"], 3)
        rows.append({"zero_stage": stage, "precision": precision, "activation_checkpointing": recompute, **row})
        print(rows[-1], flush=True)
    if arguments.save:
        head = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "bar": ERROR_BAR}
        RESULT.write_text(json.dumps({**head, "cases": rows}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
