"""What the initial weights of a LOST layer cost: CPU seconds of one core, by shape.

    python benchmarks/initial_weights.py [--save]

Drawing the dense weight, its leading singular vectors and the columns' scores: what one rank does for one layer before
the run. The layers are dealt out to the ranks, so a model takes (seconds of all its layers) / ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn

from pretrain.model import initial_values
from pretrain.model.linear.kinds.dense import DenseSettings
from pretrain.model.linear.kinds.lost import LostSettings

SHAPES = [(512, 512, 128), (768, 768, 256), (2048, 2048, 512), (4096, 4096, 1024), (4096, 11008, 1024)]
"""Inputs, outputs and rank, of the papers' 60M, 130M, 1B and 7B models."""


def seconds(make: DenseSettings | LostSettings, inputs: int, outputs: int) -> float:
    """CPU seconds of this process."""
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": make.make(inputs, outputs, 0.02)})
    started = time.process_time()
    initial_values(model, "layer", 1)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/initial_weights.json")
    save = parser.parse_args().save
    torch.set_num_threads(1)
    rows = []
    for inputs, outputs, rank in SHAPES:
        dense = seconds(DenseSettings(), inputs, outputs)
        lost = seconds(LostSettings(rank=rank), inputs, outputs)
        print(f"{inputs} x {outputs}, rank {rank}: dense {dense:.2f} s, LOST {lost:.2f} s", flush=True)
        rows.append({"inputs": inputs, "outputs": outputs, "rank": rank, "dense": dense, "lost": lost})
    if save:
        result = {"cpu_seconds": rows, "machine": f"{platform.machine()}, one core", "torch": torch.__version__}
        path = Path(__file__).parent / "results/initial_weights.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
