"""A signal saves at the next step boundary, agreed by all ranks, and ends with the reason and exit code 75."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from pretrain.monitor import read_attempts

from .runs import Runs, environment, torchrun

STEPS = "training.steps=200"


def stop(runs: Runs, name: str, command: list[str], number: signal.Signals, target: str) -> int:
    """Start ``command``, send ``number`` after some 10 steps to the launcher or to one worker; the exit code."""
    metrics = runs.run_folder(name) / "metrics.jsonl"
    enough = 10 + (len(runs.metrics(name)) if metrics.exists() else 0)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= enough:
            break
        time.sleep(0.02)
    pid = process.pid if target == "launcher" else _a_worker(process.pid)
    subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(pid)], check=True)
    _, errors = process.communicate(timeout=120)
    assert b"stopped: on request" in errors
    return process.returncode


def _a_worker(launcher: int) -> int:
    workers = [child.pid for child in psutil.Process(launcher).children() if "pretrain" in child.cmdline()]
    assert len(workers) == 2
    return workers[-1]


@pytest.mark.slow
def test_stopped_runs_go_on_to_the_same_bits(runs: Runs) -> None:
    """SIGTERM to torchrun, SIGUSR1 to one worker, SIGINT to our launcher: each stops alike, and the run goes on."""
    straight, stopped = runs.config("straight"), runs.config("stopped", checkpoint={"asynchronous": True})
    assert runs.train(straight, STEPS).returncode == 0
    # torchrun's agent would kill ranks that need longer than this, 30 s unless set, for their step and save
    impatient = ["env", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=0", sys.executable, "-m", "launch", "local"]
    ours = [*impatient, str(stopped), STEPS, "evaluation.every_steps=10", "--ranks", "2"]
    theirs = torchrun(stopped, STEPS, ranks=2)
    stop(runs, "stopped", theirs, signal.SIGTERM, "launcher")
    first = read_attempts(runs.run_folder("stopped"))[-1]
    assert (first.reason, first.signal, first.exit_code) == ("stopped", "SIGTERM", 75)
    stop(runs, "stopped", theirs, signal.SIGUSR1, "worker")
    second = read_attempts(runs.run_folder("stopped"))[-1]
    assert (second.signal, second.first_step) == ("SIGUSR1", (first.last_step or 0) + 1)
    assert stop(runs, "stopped", ours, signal.SIGINT, "launcher") == 75
    assert read_attempts(runs.run_folder("stopped"))[-1].signal == "SIGINT"
    assert subprocess.run(ours, env=environment(), check=False, capture_output=True).returncode == 0
    assert [attempt.reason for attempt in read_attempts(runs.run_folder("stopped"))] == [*["stopped"] * 3, "done"]
    assert runs.state_hashes("straight", 200) == runs.state_hashes("stopped", 200)
    assert runs.metrics("straight") == runs.metrics("stopped")


@pytest.mark.slow
def test_a_signal_within_a_step_stops_the_run_after_that_step(runs: Runs) -> None:
    """It reaches one rank while micro-steps are still to come: all ranks agree on it at the end of the same step."""
    assert runs.train(runs.config("within"), fault="signal:5").returncode != 0
    (attempt,) = read_attempts(runs.run_folder("within"))
    assert (attempt.reason, attempt.signal, attempt.last_step) == ("stopped", "SIGTERM", 6)


@pytest.mark.slow
def test_a_finished_run_started_again_changes_nothing(runs: Runs) -> None:
    config = runs.config("finished")
    assert runs.train(config, ranks=1).returncode == 0
    before, hashes = runs.metrics("finished"), runs.state_hashes("finished", 20)
    assert runs.train(config, ranks=1).returncode == 0
    assert runs.metrics("finished") == before
    assert runs.state_hashes("finished", 20) == hashes
    assert read_attempts(runs.run_folder("finished"))[-1].trained is False


@pytest.mark.slow
def test_a_killed_rank_is_named(runs: Runs) -> None:
    """The launcher says which rank was killed; what the others print is only what follows from it."""
    config = runs.config("killed")
    command = [
        sys.executable,
        "-m",
        "launch",
        "local",
        str(config),
        STEPS,
        "evaluation.every_steps=null",
        "--ranks",
        "2",
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    psutil.Process(_a_worker(process.pid)).kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: rank 1 (process " in errors
    assert "was killed by SIGKILL" in errors
    assert read_attempts(runs.run_folder("killed"))[-1].reason == "crash"
