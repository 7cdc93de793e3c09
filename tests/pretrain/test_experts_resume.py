"""A mixture of experts goes on from a checkpoint to the bit, at every ZeRO stage: weights, selection bias in fp32, and
the frequencies that losses on routers need of the steps before."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config import Config
from tests.ranks import run_on_ranks

from .methods.experts import losses
from .steps import EngineRun, tiny_config


def configured(stage: int, precision: str) -> Config:
    mixture = {
        "number": 4,
        "top_k": 2,
        "intermediate_size": 12,
        "score": "sigmoid",
        "shared": 1,
        "jitter": 0.1,
        "selection_bias": True,
    }
    balancing = losses({}, {"frequencies": "previous_step"}, {"frequencies": "running"}, {"level": "sequence"})
    return tiny_config(
        model={"experts": mixture},
        objective={"balancing": {**balancing, "bias": {"rate": 0.013}}},
        training={"precision": precision, "micro_batch": 2},
        engine={"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
    )


def state_of(run: EngineRun) -> dict[str, Any]:
    return {**run.engine.full_parameters(), "bias": run.engine.selection_bias(), "saved": run.frequencies}


def resumed(folder: str, cases: list[tuple[int, str]]) -> list[tuple[str, bool, Any, Any]]:
    """For each case: of four steps at once, and of two and two more after a checkpoint, whether all is equal."""
    from pretrain.distributed import start

    ranks, found = start(60), []
    for stage, precision in cases:
        config, place = configured(stage, precision), Path(folder) / f"{stage}{precision}"
        whole = EngineRun(config, ranks)
        for step in range(2):
            whole.backward(step)
            whole.update(step)
        whole.engine.save(place)
        saved = json.dumps(whole.frequencies)
        for step in (2, 3):
            whole.backward(step)
            whole.update(step)
        again = EngineRun(config, ranks, empty=True)
        again.engine.load(place)
        again.frequencies = json.loads(saved)
        for step in (2, 3):
            again.backward(step)
            again.update(step)
        one, other = state_of(whole), state_of(again)
        same = one.keys() == other.keys() and all(
            torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            for name, value in one.items()
        )
        found.append((f"stage {stage}, {precision}", same, one["bias"].tolist(), sorted(one["saved"])))
    return found


@pytest.mark.slow
def test_a_resumed_mixture_is_the_uninterrupted_one() -> None:
    cases = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
    with tempfile.TemporaryDirectory() as folder:
        for where, same, bias, saved in run_on_ranks(resumed, 2, folder, cases)[0]:
            assert same, where
            assert saved == ["global_batch_previous_step", "global_batch_running"]
            # four moves of 0.013, which bf16 would have rounded by 1e-5 and more
            assert all(abs(value / 0.013 - round(value / 0.013)) < 1e-4 for row in bias for value in row), (where, bias)
            assert max(abs(value) for row in bias for value in row) > 0.012
