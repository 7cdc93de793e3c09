"""A batch-size ramp: steps of 1, 2 and 4 micro-steps, up and down, equal the plain loop over the same rows."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.check import check_run
from pretrain.config import Config
from pretrain.engine import accumulation_steps
from tests.ranks import run_on_ranks

from .steps import relative_difference, run_engine, run_plain, tiny_config

UP = [{"steps": 1, "global_batch": 2}, {"steps": 1, "global_batch": 4}]
DOWN = [{"steps": 1, "global_batch": 8}, {"steps": 1, "global_batch": 2}]
CASES = [(stage, offload) for stage in (0, 1, 2, 3) for offload in (("none", "cpu") if stage in (1, 2) else ("none",))]


def ramped(ramp: list[dict[str, int]], engine: dict[str, Any]) -> Config:
    reweighting = {"strategy": "linupper", "temperature": 0.4}
    training = {"batch_ramp": ramp, "micro_batch": 1, "global_batch": 4 if ramp is DOWN else 8}
    return tiny_config(training=training, objective={"reweighting": reweighting}, engine=engine)


def found() -> list[tuple[str, float, float, list[float]]]:
    """Per ramp and engine: what it was, the differences of gradients and parameters, and of the losses."""
    from pretrain.distributed import start

    ranks = start(60)
    seen = []
    for ramp in (UP, DOWN):
        plain = run_plain(ramped(ramp, {"zero_stage": 0}), ranks.world_size)
        for stage, offload in CASES:
            config = ramped(ramp, {"zero_stage": stage, "offload_optimizer": offload})
            ours = run_engine(config, ranks)
            losses = [abs(a - b) for a, b in zip(ours["losses"], plain["losses"], strict=True)]
            gradients = relative_difference(ours["gradients"], plain["gradients"]) if offload == "none" else 0.0
            name = f"{'up' if ramp is UP else 'down'}, stage {stage}, offload {offload}"
            seen.append((name, gradients, relative_difference(ours["parameters"], plain["parameters"]), losses))
    return seen


@pytest.mark.slow
def test_every_stage_takes_the_plain_steps() -> None:
    for name, gradients, parameters, losses in run_on_ranks(found, 2)[0]:
        assert gradients < 1e-6, name
        assert parameters < 1e-4, name
        assert max(losses) < 1e-5, name


def test_the_ramp_decides_steps_positions_and_the_end() -> None:
    config = tiny_config(training={"batch_ramp": UP, "steps": None, "tokens": 24 * 100})
    assert [config.batch_plan.batch(step) for step in range(4)] == [2, 4, 8, 8]
    assert config.total_steps == 2 + 12, "6 sequences in the ramp, 94 in steps of 8"
    assert tiny_config(training={"batch_ramp": UP, "steps": None, "tokens": 24 * 102}).total_steps == 14
    assert accumulation_steps(tiny_config(training={"batch_ramp": UP}), 2) == [1, 2, 4]


def test_a_ramp_that_does_not_divide_or_never_ends_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_ramp\.0\.global_batch = 2 is not a multiple of micro_batch 1 x 4"):
        accumulation_steps(tiny_config(training={"batch_ramp": UP}), 4)
    with pytest.raises(UserError, match=r"batch_ramp\.1\.global_batch 3 is not a multiple of micro_batch 2"):
        tiny_config(training={"batch_ramp": [UP[1], {"steps": 1, "global_batch": 3}], "micro_batch": 2})
    with pytest.raises(UserError, match=r"batch_ramp lasts 3 steps.*is not before the run's end at 3 steps"):
        check_run(tiny_config(training={"batch_ramp": [{"steps": 3, "global_batch": 4}], "steps": 3}), 1)
