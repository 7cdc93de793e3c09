"""What an optimizer's update costs beside AdamW's: one process, taking turns, one run.

    python benchmarks/optimizers.py [--turns 12] [--save]

A 13M-parameter decoder through the engine at ZeRO 1, fp32, one thread, CPU time. An update (clipping, optimizer,
writing the weights back) costs the same whatever the batch, so it is measured apart from the forward and backward pass,
whose cost is proportional to the tokens: the ratio of two optimizers' steps is given for the measured 512 tokens a
step, and computed from the two measured parts for 131,072, the batch of configs/llama_60m.yaml. GaLore's singular value
decompositions are measured in the steps that have one, and counted once in 200 steps, its default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from data_pipeline.batches import Batch, make_batch
from data_pipeline.settings import build_settings
from pretrain.config import Config
from pretrain.distributed import Distributed, finish, start
from pretrain.engine import Engine
from pretrain.model import parameter_shapes
from pretrain.objective import Objective

VOCABULARY, LENGTH, BATCH, WHOLE_BATCH, EOS = 400, 256, 2, 131_072, 3
WARM_UP, GALORE_GAP, GALORE_DEFAULT_GAP = 3, 4, 200
CONTENDERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw"},
    "muon": {"kind": "muon", "iterate_in": "fp32"},
    "muon in bf16": {"kind": "muon", "iterate_in": "bf16"},
    "galore": {"kind": "galore", "rank": 96, "gap": GALORE_GAP},
}


def settings(optimizer: dict[str, Any]) -> Config:
    return build_settings(
        Config,
        {
            "run": {"name": "benchmark"},
            "data": {"sources": {"text": {"path": "unused"}}, "seq_len": LENGTH},
            "model": {"vocab_size": VOCABULARY, "hidden_size": 384, "layers": 7, "heads": 6, "intermediate_size": 1024},
            "optimizer": optimizer,
            "training": {"steps": 10, "global_batch": BATCH, "micro_batch": BATCH, "precision": "fp32"},
            "engine": {"zero_stage": 1},
        },
        "benchmark",
    )


def random_batch(step: int) -> Batch:
    rows = np.random.default_rng(step).integers(4, VOCABULARY, (BATCH, LENGTH + 1)).astype(np.uint16)
    positions = np.arange(BATCH, dtype=np.int64)
    return make_batch(rows, EOS, np.zeros(BATCH, np.int64), positions, positions)


def contender(config: Config, ranks: Distributed) -> Callable[[int], tuple[float, float]]:
    """A step that tells its CPU seconds: of forward and backward pass, and of the update."""
    engine = Engine(config, VOCABULARY, ranks)
    objective = Objective(config.objective, 1, ranks)

    def step(turn: int) -> tuple[float, float]:
        batch = random_batch(turn)
        started = time.process_time()
        engine.begin_step(1)
        objective.begin_step(turn, [batch])
        engine.backward(objective.micro_step(engine.forward(batch), batch))
        passed = time.process_time()
        engine.step(1e-3)
        return passed - started, time.process_time() - passed

    return step


def measure(turns: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    ranks = start(60)
    steps = {name: contender(settings(optimizer), ranks) for name, optimizer in CONTENDERS.items()}
    passes: list[float] = []
    updates: dict[str, list[float]] = {name: [] for name in steps}
    decompositions: list[float] = []
    for turn in range(WARM_UP + turns):
        for name, step in steps.items():
            passing, update = step(turn)
            if turn < WARM_UP:  # the first steps allocate
                continue
            passes.append(passing)
            rare = name == "galore" and turn % GALORE_GAP == 0
            (decompositions if rare else updates[name]).append(update)
    seconds = {name: statistics.median(values) for name, values in updates.items()}
    decomposing = statistics.median(decompositions) - seconds["galore"]
    seconds["galore"] += decomposing / GALORE_DEFAULT_GAP
    passing, whole = statistics.median(passes), WHOLE_BATCH / (BATCH * LENGTH)
    shapes = parameter_shapes(settings(CONTENDERS["adamw"]).model, VOCABULARY)
    elements = {
        name: sum(settings(optimizer).optimizer.state_elements(*shape) for shape in shapes.items())
        for name, optimizer in CONTENDERS.items()
    }
    return {
        "tokens": BATCH * LENGTH,
        "forward_and_backward_seconds": passing,
        "update_seconds": seconds,
        "galore_decomposition_seconds": decomposing,
        "step_ratio_512_tokens": {
            name: (passing + each) / (passing + seconds["adamw"]) for name, each in seconds.items()
        },
        "step_ratio_131072_tokens": {
            name: (whole * passing + each) / (whole * passing + seconds["adamw"]) for name, each in seconds.items()
        },
        "state_ratio": {name: each / elements["adamw"] for name, each in elements.items()},
        "turns": turns,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12, help="measured steps of each optimizer")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/optimizers.json")
    arguments = parser.parse_args()
    result = measure(arguments.turns)
    print(json.dumps(result, indent=2))
    if arguments.save:
        path = Path(__file__).parent / "results/optimizers.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    finish(0, together=True)


if __name__ == "__main__":
    main()
