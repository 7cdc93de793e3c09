"""A finished run exits with 0: gloo's threads, left alone, abort one run in ten while the interpreter shuts down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .runs import Runs, environment

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_runs_in_a_row_exit_with_0(runs: Runs) -> None:
    config = runs.config("again", training={"steps": 1, "global_batch": 8, "micro_batch": 2, "precision": "fp32"})
    codes = [runs.train(config, f"run.name=again{number}").returncode for number in range(2)]
    assert codes == [0] * 2


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_fifty_runs_of_the_demo_in_a_row_exit_with_0(tmp_path: Path) -> None:
    """The demo's configuration, three steps each, on two ranks."""
    data = ["-m", "data_pipeline", "prepare", str(ROOT / "configs/data/stdlib.yaml")]
    subprocess.run([sys.executable, *data], cwd=tmp_path, check=True, capture_output=True)
    codes = []
    for number in range(50):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "pretrain", "train", str(ROOT / "configs/demo.yaml")]
        command += [f"run.name=demo{number}", "training.steps=3", "schedule.warmup_steps=0", "evaluation.sequences=4"]
        command += ["objective.reweighting.start_step=0"]
        ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, check=False)
        codes.append(ended.returncode)
    assert codes == [0] * 50, codes
    assert len(os.listdir(tmp_path / "runs")) == 50
