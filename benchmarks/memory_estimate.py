"""The memory estimate of `pretrain-launch preflight` against the peak that training reaches, on the CPU.

    python benchmarks/memory_estimate.py [--save]

Configurations of a model of 34 million parameters, or of one with experts that the ranks divide, on two ranks with
gloo, each in processes of its own: two optimizer steps of two micro-steps. Measured is the peak of the resident memory
of rank 0 beyond what it was before the engine was built (after a first engine of a tiny model, which loads all
libraries), against the estimate without the share of CUDA. The C library is told to give every freed tensor back at
once (MALLOC_MMAP_THRESHOLD_): by its own rules it keeps a tenth to a fifth more, by chance. On a CPU norms are not
fused and the allocator differs: this says how far the arithmetic is right, not what a GPU takes. ``copies``: what an
asynchronous save then adds on rank 0 and on rank 1, against the estimate of the host's memory. With experts, oneDNN is
not used: it compiles and keeps a bf16 kernel for each number of rows that an expert gets, 0.1 to 0.2 GB here, which a
GPU does not. Limit (exit code 1 beyond it): 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from data_pipeline.batches import make_batch
from data_pipeline.settings import build_settings
from launch.preflight.memory import ERROR_BAR, estimate, host_copies
from pretrain.config import Config
from pretrain.distributed import Distributed, finish, start
from pretrain.engine import Engine
from pretrain.objective import Objective

RANKS, VOCABULARY, LENGTH, MICRO, BUCKET = 2, 8192, 256, 2, 2_000_000
CASES = [
    (0, "fp32", "none", 1),
    (1, "fp32", "none", 1),
    (1, "bf16", "none", 1),
    (2, "bf16", "full", 1),
    (3, "bf16", "none", 1),
    (0, "fp32", "none", 2),
    (1, "bf16", "none", 2),
    (2, "fp32", "none", 2),
]
"""ZeRO stage, precision, recompute, ranks among which 8 experts in every block are divided (1: a dense model)."""
LIMIT = 0.1
RESULT = Path(__file__).parent / "results" / "memory_estimate.json"


def settings(stage: int, precision: str, recompute: str, divided: int, hidden: int = 512, layers: int = 8) -> Config:
    model: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": hidden, "layers": layers, "heads": 8}
    if divided > 1:
        model["experts"] = {"number": 8, "top_k": 2, "intermediate_size": hidden * 2 // 3 // 8 * 8}
    engine: dict[str, Any] = {"zero_stage": stage, "expert_parallel": divided}
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
            logits, routing = engine.training_forward(batch)
            engine.backward(objective.micro_step(logits, batch, routing))
        engine.step(1e-4)
    return engine


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(number: int) -> None:
    torch.backends.mkldnn.enabled = CASES[number][3] == 1
    ranks = start(900)
    train(settings(*CASES[number], hidden=32, layers=1), ranks)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    config = settings(*CASES[number])
    engine = train(config, ranks)
    taken, before = resident("VmHWM") - before, resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        engine.begin_save(Path(ranks.broadcast_object(folder)), later=True)
        copies = ranks.gather_objects(resident("VmRSS") - before)
        ranks.barrier()
    if ranks.rank == 0:
        found, expected = estimate(config, VOCABULARY, RANKS), host_copies(config, VOCABULARY, RANKS)
        told = {"measured": taken, "estimated": round(found.tensors)}
        print(json.dumps({**told, "copies": {"measured": copies, "estimated": [round(part) for part in expected]}}))
        sys.stdout.flush()
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
    for number, (stage, precision, recompute, divided) in enumerate(CASES):
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
        case = {"zero_stage": stage, "precision": precision, "activation_checkpointing": recompute}
        rows.append({**case, "expert_parallel": divided, **row})
        print(rows[-1], flush=True)
    if arguments.save:
        head = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "bar": ERROR_BAR}
        RESULT.write_text(json.dumps({**head, "cases": rows}, indent=2) + "\n")
    if any(abs(row["ratio"] - 1) > LIMIT for row in rows):
        sys.exit(f"over the limit of {LIMIT:.0%}")
    return None


if __name__ == "__main__":
    main()
