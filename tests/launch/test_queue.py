"""What is asked of Slurm's queue, and what is remembered of the jobs that were submitted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tenacity

from launch import queue, sweep
from launch.queue import JOBS_FILE, Queued, SlurmError, in_the_queue, queued, remember, remembered


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that notes its arguments in ``calls`` and then does what is appended to it."""
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/calls\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


def says(program: Path, text: str) -> None:
    with program.open("a") as handle:
        handle.write(text + "\n")


def test_slurm_is_asked_for_these_jobs_alone(squeue: Path, tmp_path: Path) -> None:
    says(squeue, "echo '7|RUNNING|None|'; echo '12_3|PENDING|Priority|n2'")
    found = queued(["7", "12"])
    assert found == {"7": Queued("7", "RUNNING", "None"), "12_3": Queued("12_3", "PENDING", "Priority", "n2")}
    assert queued([]) == {}
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--jobs=7,12 " in call


def test_a_job_that_slurm_has_forgotten_is_not_in_the_queue(squeue: Path) -> None:
    says(squeue, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert in_the_queue(["7"]) == {}


def test_a_slurm_that_does_not_answer_is_no_empty_queue_to_who_waits(
    squeue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(squeue, f"(($(wc -l <{tmp_path}/calls) == 2)) && echo '7_1|RUNNING|None|' && exit")
    says(squeue, f"(($(wc -l <{tmp_path}/calls) == 4)) && echo '7_1|COMPLETED|None|' && exit")
    says(squeue, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    sweep.wait("7")
    assert len((tmp_path / "calls").read_text().splitlines()) == 4
    monkeypatch.setattr(tenacity, "stop_after_delay", lambda seconds: tenacity.stop_after_attempt(3))
    with pytest.raises(SlurmError, match=r"squeue refuses: .*Unable to contact slurm controller\.$"):
        sweep.wait("7")
    assert queued(["7"]) == {}, "but it is for who only looks"


def test_a_half_written_line_of_jobs_neither_hurts_the_reader_nor_the_next_line(tmp_path: Path) -> None:
    assert remembered(tmp_path) == []
    remember(tmp_path, "7", ["sbatch", "run.yaml"])
    with (tmp_path / JOBS_FILE).open("a") as handle:
        handle.write('{"command": ["sba')
    assert remembered(tmp_path) == ["7"]
    remember(tmp_path, "8", [])
    assert remembered(tmp_path) == ["7", "8"]


def test_the_first_line_of_jobs_is_only_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another that submits at once may have begun the file by then, which must not be written over."""
    written: list[Path] = []
    monkeypatch.setattr(queue.lines, "publish_bytes", lambda path, content: written.append(path))
    remember(tmp_path, "7", [])
    assert not written
    assert remembered(tmp_path) == ["7"]
