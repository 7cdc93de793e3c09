"""torchrun restarts the workers of a host after one of them was killed: they find each other and go on."""

from __future__ import annotations

import pytest

from pretrain.monitor import read_attempts

from .runs import Runs


@pytest.mark.slow
def test_restarted_workers_go_on_to_the_same_bits(runs: Runs) -> None:
    bf16 = {"steps": 20, "precision": "bf16"}  # ZeRO 1 in bf16 is an optimizer of its own in DeepSpeed
    straight, broken = runs.config("straight", training=bf16), runs.config("broken", training=bf16)
    assert runs.train(straight).returncode == 0
    ended = runs.train(broken, fault="step:10", restarts=1)
    assert ended.returncode == 0, ended.stderr
    first, second = read_attempts(runs.run_folder("broken"))
    assert first.reason in (None, "crash")
    assert (second.first_step, second.last_step, second.reason) == (9, 20, "done")
    assert runs.state_hashes("straight", 20) == runs.state_hashes("broken", 20)
    assert runs.metrics("straight") == runs.metrics("broken")
