"""A run whose output nobody takes goes on, and says so in its metrics."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pretrain.monitor import read_attempts

from .runs import Runs, environment


@pytest.mark.slow
def test_a_run_outlives_its_output(runs: Runs) -> None:
    """Nobody reads the pipe of its standard output, and the disk of its standard error is full."""
    config = runs.config("unheard")
    read, pipe = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pretrain", "train", str(config)]
    try:
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, env=environment(), stdout=pipe, stderr=full, timeout=240, check=False)
    finally:
        os.close(pipe)
    assert done.returncode == 0
    (attempt,) = read_attempts(runs.run_folder("unheard"))
    assert (attempt.reason, attempt.last_step) == ("done", 20)
    told = [line["message"] for line in runs.metrics("unheard") if line.get("event") == "output_lost"]
    assert "standard output can't be written (Broken pipe)" in told[-1]
    assert "standard error can't be written (No space left on device)" in told[-1]
