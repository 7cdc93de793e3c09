"""A tiny run on a data set of a test, for what looks at runs without starting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.preflight import Finding, Request, cluster, preflight
from launch.queue import SlurmError
from pretrain.checkpoint.manifest import record_file, write_manifest
from pretrain.config import load_config
from pretrain.data import open_data
from pretrain.distributed import Distributed
from pretrain.state import TrainState, checkpoint_state
from tests.system.runs import Runs

SLURM = {
    "sinfo": "gpu|2-00:00:00|4|gpu:a100:8(S:0-1)|up\ncpu|1:00:00|2|(null)|up\nold|infinite|1|(null)|down\n",
    "sacctmgr": "mine\nours\n",
    "scontrol": "PartitionName=cpu Default=YES",
}
"""What Slurm's commands say on a cluster of three partitions."""


def request(runs: Runs, name: str = "run", *overrides: str, **options: Any) -> Request:
    """The tiny run on one node without GPUs."""
    path = runs.folder / f"{name}.yaml"
    return Request(path if path.exists() else runs.config(name), overrides, **{"gpus": False, **options})


def codes(found: list[Finding], *severities: str) -> list[str]:
    return [finding.code for finding in found if finding.severity in (severities or ("error", "warning"))]


def check(runs: Runs, *overrides: str, **options: Any) -> list[Finding]:
    return preflight(request(runs, "run", *overrides, **options))


def write_steps(folder: Path, steps: int, seconds: float = 0.5) -> None:
    """The metrics of a run that has done some steps."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {"loss": 2.0, "step_seconds": seconds, "tokens_per_second": 1000.0, "time": 1000.0}
    lines = [json.dumps({**line, "step": step}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def save(runs: Runs, step: int = 4, world_size: int = 2) -> Path:
    """A checkpoint of the tiny run without tensors."""
    config = load_config(runs.folder / "run.yaml")
    path = config.run_folder / "checkpoints" / f"step_{step:09d}"
    path.mkdir(parents=True)
    state = checkpoint_state(
        TrainState(step, step * 8), config, open_data(config), Distributed(0, world_size, torch.device("cpu"))
    )
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path, [record_file(path, path / "state.json")])
    return path


def slurm_says(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    def run(*command: str) -> str:
        if command[0] not in answers:
            raise SlurmError(f"{command[0]} refuses: no controller.")
        return answers[command[0]]

    monkeypatch.setattr(cluster, "have", lambda command: True)
    monkeypatch.setattr(cluster, "run", run)
