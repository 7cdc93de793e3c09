"""Start real runs under the real torchrun, and read what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_pipeline.testing import write_token_dataset
from pretrain.checkpoint import read_manifest
from pretrain.monitor import WALL_CLOCK_FIELDS, read_metrics

FAULTY = Path(__file__).parent / "faulty_train.py"


def write_tiny_data(folder: Path, seed: int = 0) -> None:
    """A data set of random documents whose tokens depend a little on the domain, so that losses differ."""
    random = np.random.default_rng(seed)

    def documents(count: int, low: int, high: int) -> list[list[int]]:
        return [random.integers(low, high, random.integers(5, 80)).tolist() for _ in range(count)]

    write_token_dataset(
        folder,
        {
            ("a", "train"): documents(300, 4, 300),
            ("b", "train"): documents(300, 4, 40),
            ("a", "heldout"): documents(20, 4, 300),
            ("b", "heldout"): documents(20, 4, 40),
        },
        block_tokens=64,
    )


@dataclass
class Runs:
    """Runs below one folder, of a model of about 40,000 parameters."""

    folder: Path
    data: Path

    def config(self, name: str, **sections: dict[str, Any]) -> Path:
        """Write the YAML file of a run; ``sections`` are merged over the tiny defaults."""
        content: dict[str, Any] = {
            "run": {"name": name, "folder": str(self.folder / "runs")},
            "data": {
                "seq_len": 32,
                "sources": {
                    "a": {"path": str(self.data), "domain": "a", "max_epochs": None},
                    "b": {"path": str(self.data), "domain": "b", "max_epochs": None, "weight": 0.5},
                },
            },
            "model": {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 48},
            "objective": {"reweighting": {"strategy": "linupper", "temperature": 1.0}},
            "optimizer": {"lr": 3e-3},
            "training": {"steps": 20, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
            "engine": {"zero_stage": 1},
            "checkpoint": {"every_steps": 4},
            "evaluation": {"every_steps": 10},
            "monitor": {"tensorboard": False},
        }
        for section, values in sections.items():
            content[section] = {**content.get(section, {}), **values}
        if content["engine"].get("zero_stage") == 3:
            content["engine"].setdefault("persistence_threshold", 0)  # really partition a model this small
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train(
        self, config: Path, *overrides: str, ranks: int = 2, fault: str = "", restarts: int = 0, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Train to the end (or to the ``fault``, see faulty_train.py) under torchrun."""
        return subprocess.run(
            torchrun(config, *overrides, ranks=ranks, fault=fault, restarts=restarts),
            env=environment(fault),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The metric lines of a run without what depends on the clock."""
        lines = [line for line in read_metrics(self.run_folder(name)) if line.get("event") != "straggler"]
        return [{key: value for key, value in line.items() if key not in WALL_CLOCK_FIELDS} for line in lines]

    def state_hashes(self, name: str, step: int) -> dict[str, str]:
        """Hash of every file of a checkpoint that holds tensors: weights, optimizer, random states."""
        files = read_manifest(self.run_folder(name) / "checkpoints" / f"step_{step:09d}")
        assert files is not None, f"{name} has no complete checkpoint of step {step}"
        return {file.path: file.sha256 for file in files if file.path.endswith(".pt")}


def torchrun(config: Path, *overrides: str, ranks: int, fault: str = "", restarts: int = 0) -> list[str]:
    """The command line a user types, or the same with a fault built in."""
    program = [str(FAULTY)] if fault else ["-m", "pretrain"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "--max-restarts", str(restarts), *program, "train", str(config), *overrides]


def environment(fault: str = "") -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TEST_FAULT": fault}
