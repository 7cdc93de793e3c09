"""Law 5, same topology: a run that was killed and resumed is bitwise the uninterrupted one (and law 4 on the way)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pretrain.monitor import read_attempts
from tests.marks import campaign

from .runs import Runs

Straight = Callable[[int], Runs]


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Straight:
    """The uninterrupted run of a ZeRO stage, made once: a run named ``straight``."""

    @cache
    def run(stage: int) -> Runs:
        runs = Runs(tmp_path_factory.mktemp(f"straight{stage}"), tiny_data)
        done = runs.train(runs.config("straight", engine={"zero_stage": stage}))
        assert done.returncode == 0, done.stderr
        return runs

    return run


def assert_equal_runs(straight: Runs, runs: Runs) -> None:
    assert straight.state_hashes("straight", 20) == runs.state_hashes("broken", 20)
    assert straight.metrics("straight") == runs.metrics("broken")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [campaign(0), 1, campaign(2), 3])
def test_killed_in_a_step_and_resumed(runs: Runs, straight: Straight, stage: int) -> None:
    broken = runs.config("broken", engine={"zero_stage": stage})
    killed = runs.train(broken, fault="step:10")
    assert killed.returncode != 0
    assert [line["step"] for line in runs.metrics("broken")][-1] == 10
    resumed = runs.train(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_runs(straight(stage), runs)
    first, second = read_attempts(runs.run_folder("broken"))
    assert first.reason in (None, "crash")
    assert (second.first_step, second.last_step, second.reason, second.lost_steps) == (9, 20, "done", 2)
    assert str(second.resumed_from).endswith("step_000000008")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fault", "resumes_at", "asynchronous"),
    [
        (1, "write:4", 4, True),
        (2, "manifest:2", 4, True),
        (3, "rename:2", 4, False),
        campaign(3, "write:7", 8, False),
        (0, "remove:1", 12, False),
    ],
)
def test_killed_in_a_save_and_resumed(
    runs: Runs, straight: Straight, stage: int, fault: str, resumes_at: int, asynchronous: bool
) -> None:
    """The half checkpoint is invisible: the run goes on from the last complete one."""
    saves = {"every_steps": 4, "asynchronous": asynchronous}
    broken = runs.config("broken", engine={"zero_stage": stage}, checkpoint=saves)
    assert runs.train(broken, fault=fault).returncode != 0
    resumed = runs.train(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert read_attempts(runs.run_folder("broken"))[-1].first_step == resumes_at + 1
    assert_equal_runs(straight(stage), runs)
    checkpoints = sorted(path.name for path in (runs.run_folder("broken") / "checkpoints").iterdir())
    assert checkpoints == ["step_000000016", "step_000000020"]
