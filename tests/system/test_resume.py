"""Law 5, same topology: a run that was killed and resumed is bitwise the uninterrupted one (and law 4 on the way)."""

from __future__ import annotations

import pytest

from pretrain.monitor import read_attempts

from .runs import Runs

STAGES = (0, 1, 2, 3)


def assert_equal_runs(runs: Runs, one: str, other: str) -> None:
    assert runs.state_hashes(one, 20) == runs.state_hashes(other, 20)
    assert runs.metrics(one) == runs.metrics(other)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_a_step_and_resumed(runs: Runs, stage: int) -> None:
    straight = runs.config("straight", engine={"zero_stage": stage})
    broken = runs.config("broken", engine={"zero_stage": stage})
    done = runs.train(straight)
    assert done.returncode == 0, done.stderr
    killed = runs.train(broken, fault="step:10")
    assert killed.returncode != 0
    assert [line["step"] for line in runs.metrics("broken")][-1] == 10
    resumed = runs.train(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_runs(runs, "straight", "broken")
    first, second = read_attempts(runs.run_folder("broken"))
    assert first.reason in (None, "crash")
    assert (second.first_step, second.last_step, second.reason, second.lost_steps) == (9, 20, "done", 2)
    assert str(second.resumed_from).endswith("step_000000008")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault", "resumes_at"),
    [(1, "write:4", 4), (2, "manifest:2", 4), (3, "rename:2", 4), (3, "write:7", 8), (0, "remove:1", 12)],
)
def test_killed_in_a_save_and_resumed(runs: Runs, stage: int, fault: str, resumes_at: int) -> None:
    """The half checkpoint is invisible: the run goes on from the last complete one."""
    straight = runs.config("straight", engine={"zero_stage": stage})
    broken = runs.config("broken", engine={"zero_stage": stage})
    assert runs.train(straight).returncode == 0
    assert runs.train(broken, fault=fault).returncode != 0
    resumed = runs.train(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert read_attempts(runs.run_folder("broken"))[-1].first_step == resumes_at + 1
    assert_equal_runs(runs, "straight", "broken")
    checkpoints = sorted(path.name for path in (runs.run_folder("broken") / "checkpoints").iterdir())
    assert checkpoints == ["step_000000016", "step_000000020"]
