"""A run with the Z-loss: it learns, resumes to the bit, and its evaluation tells no likelihood."""

from __future__ import annotations

import pytest

from pretrain.evaluate_run import evaluate_run
from pretrain.plan import make_plan, show_plan

from .runs import Runs

SECTIONS = {
    "objective": {"loss": {"kind": "spherical_z", "a": 0.5, "b": 4.0}},
    "training": {"steps": 8},
    "checkpoint": {"every_steps": 3},
    "evaluation": {"every_steps": 4},
    "engine": {"zero_stage": 3},
}


@pytest.mark.slow
def test_a_run_with_the_z_loss(runs: Runs) -> None:
    straight = runs.train(runs.config("straight", **SECTIONS))
    assert straight.returncode == 0, straight.stderr
    broken = runs.config("broken", **SECTIONS)
    assert runs.train(broken, fault="step:7").returncode != 0
    resumed = runs.train(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert runs.state_hashes("straight", 8) == runs.state_hashes("broken", 8)
    assert runs.metrics("straight") == runs.metrics("broken")

    losses = [line["loss"] for line in runs.metrics("straight") if "objective" in line]
    assert losses[-1] < losses[0]
    first, last = (line for line in runs.metrics("straight") if "evaluation" in line)
    assert last["loss"] < first["loss"]
    assert abs(last["loss"] - losses[-1]) < 0.5, "the same loss as in training"
    assert not [key for key in last if "perplexity" in key or "bits" in key]
    again = evaluate_run(runs.run_folder("straight"), None, None)
    for key in ("loss", "accuracy", "reciprocal_rank", "softmax_loss", "domain_accuracy/a"):
        assert again[key] == pytest.approx(last[key], rel=1e-6), key
    assert "reciprocal rank" in straight.stdout

    plan = make_plan(runs.config("planned", **SECTIONS), [], 2)
    per_step = next(part["flops_per_step"] for part in plan["parts"] if part["name"] == "head")
    assert per_step == 4 * plan["vocab_size"] * 32**2
    assert plan["flops"] == plan["flops_per_token"] * plan["tokens"] + 8 * 2 * per_step
    assert f"and {per_step:.3e} a step on each rank" in show_plan(plan)
