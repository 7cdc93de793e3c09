"""A rank that is stopped by SIGSTOP: the run says which, leaves stacks, ends, and may be started again."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest

from launch.restarts import judge
from pretrain.monitor import read_attempts

from .runs import Runs, environment, torchrun


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_ends(runs: Runs) -> None:
    patience = {"hang_seconds": 6.0, "hang_multiple": 5.0}
    config = runs.config(
        "hangs",
        resilience=patience,
        training={"steps": 100_000},
        evaluation={"every_steps": None, "sequences": None},
        checkpoint={"every_steps": None},  # only steps are watched
    )
    process = subprocess.Popen(
        torchrun(config, ranks=2), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = runs.run_folder("hangs") / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 10:
            break
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if "pretrain" in child.cmdline()]
    victim = next(worker for worker in workers if worker.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=180)
    assert process.returncode != 0
    attempt = read_attempts(runs.run_folder("hangs"))[-1]
    assert (attempt.reason, attempt.exit_code) == ("crash", 1)
    assert "no step ended for " in attempt.message
    assert "rank 1 on " in attempt.message
    assert "does not answer (stopped" in attempt.message
    assert "rank 0 waits in " in attempt.message
    assert attempt.guilty == (1,)
    assert attempt.message in errors
    assert not victim.is_running()  # SIGTERM would have waited for SIGCONT
    stacks = (runs.run_folder("hangs") / "hangs" / "attempt_1" / "rank_00000.txt").read_text()
    assert "distributed_c10d.py" in stacks
    assert judge(runs.run_folder("hangs"), 0, asked=False, crashes=5).action == "again"
