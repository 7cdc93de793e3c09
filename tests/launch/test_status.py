"""What `status` says of runs in every state, without Slurm and with one that answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import status as module
from launch.queue import Queued, remember
from launch.status import RunStatus, run_status, show_status, status
from pretrain.monitor import AttemptsLog
from pretrain.monitor.attempts import Reason

from .runs_of_tests import write_steps


def write(folder: Path, steps: int, reason: Reason | None = None, message: str = "") -> Path:
    write_steps(folder, steps)
    training = {"steps": 100, "tokens": None, "global_batch": 4, "batch_ramp": []}
    (folder / "config.yaml").write_text(yaml.safe_dump({"training": training, "data": {"seq_len": 8}}))
    log = AttemptsLog(folder)
    number = log.start(hosts=["h"], world_size=1, versions={}, first_step=1, resumed_from=None)
    if reason:
        log.stop(number, last_step=steps, reason=reason, exit_code=1, message=message)
    return folder


def at(folder: Path, now: float, **queue: Queued) -> RunStatus:
    return run_status(folder, queue, now)


def test_states(tmp_path: Path) -> None:
    running = write(tmp_path / "running", 20)
    assert (at(running, 1010.0).state, at(running, 1010.0).eta_seconds) == ("running", 40.0)
    silent = at(running, 2000.0)
    assert (silent.state, silent.eta_seconds, silent.step, silent.total_steps) == ("silent", None, 20, 100)
    crashed = at(write(tmp_path / "crashed", 7, "crash", "out of memory"), 1010.0)
    assert (crashed.state, crashed.last_error) == ("crash", "attempt 1: crash: out of memory")
    assert at(write(tmp_path / "done", 100, "done"), 1010.0).last_error == ""
    assert at(tmp_path / "nothing", 1010.0).state == "new"


def test_the_queue_comes_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 20, "stopped", "on request")
    remember(folder, "11", ["sbatch"])
    remember(folder, "12", ["sbatch"])
    waiting = at(folder, 1010.0, **{"11": Queued("11", "FAILED", "None"), "12": Queued("12", "PENDING", "Resources")})
    assert (waiting.state, waiting.job, waiting.reason) == ("PENDING", "12", "Resources")
    running = at(folder, 1010.0, **{"11": Queued("11", "RUNNING", "None", "n2")})
    assert (running.state, running.job, running.reason, running.eta_seconds) == ("RUNNING", "11", None, 40.0)
    assert (running.excluded, waiting.excluded) == ("n2", None)
    assert "job 11 without n2" in show_status([running])
    assert at(folder, 1010.0).state == "stopped"


def test_every_run_below_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b", 20, "crash", "what was said")
    (tmp_path / "b" / "code" / "pretrain").mkdir(parents=True)
    (tmp_path / "b" / "code" / "config.yaml").write_text("a: 1")
    write(tmp_path / "sweep" / "lr_1", 3, "done")
    (tmp_path / "sweep" / "sweep.yaml").write_text("name: sweep")
    remember(tmp_path / "sweep", "5", ["sbatch"])
    remember_only = tmp_path / "a"
    remember_only.mkdir()
    remember(remember_only, "7", ["sbatch"])
    monkeypatch.setattr(module, "queued", lambda jobs: {"7": Queued("7", "PENDING", "Priority")})
    found = status(tmp_path)
    assert [(Path(run.folder).name, run.state) for run in found] == [("a", "PENDING"), ("b", "crash"), ("lr_1", "done")]
    shown = show_status(found, now=1060.0)
    assert "job 7 (Priority)" in shown
    assert "step 20/100  loss 2.0000  1,000 tokens/s  1 min 0 s ago" in shown
    assert "attempt 1: crash: what was said" in shown
    assert show_status([]) == "no runs here"


def test_launch_never_imports_the_trainer() -> None:
    program = (
        "import sys, launch.__main__, launch.slurm, launch.sweep, launch.status, launch.preflight, launch.job\n"
        "assert not {'pretrain.train', 'pretrain.run', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
