"""A step with a gradient that is not finite on one rank, or that is refused, leaves no trace at any ZeRO stage."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from pretrain.config import Config
from tests.marks import campaign
from tests.ranks import run_on_ranks

from .steps import RATES, EngineRun, micro_batches, tiny_config

LEAN = [(0, "fp32", "adamw"), (1, "bf16", "experts"), (2, "fp32", "adamw"), (3, "bf16", "adamw")]
EXPERTS = [(0, "fp32"), *itertools.product((1, 2), ("fp32", "bf16"))]
ALL = [
    *itertools.product((0, 1, 2, 3), ("fp32", "bf16"), ("adamw",)),
    *((stage, "bf16", "muon") for stage in range(4)),
    *((*case, "experts") for case in EXPERTS),
]
MIXTURE = {"number": 4, "top_k": 2, "intermediate_size": 12}


def case_config(stage: int, precision: str, kind: str = "adamw", offload: str = "none") -> Config:
    """``kind``: an optimizer, or ``experts``: AdamW, and the experts of a mixture on two ranks."""
    divided = kind == "experts"
    return tiny_config(
        model={"experts": MIXTURE} if divided else {},
        optimizer={"kind": kind} if kind == "muon" else {},
        training={"steps": 3, "global_batch": 8, "micro_batch": 2, "precision": precision},
        engine={
            "zero_stage": stage,
            "offload_optimizer": offload,
            "expert_parallel": 2 if divided else 1,
            **({"persistence_threshold": 0} if stage == 3 else {}),
        },
    )


def nan_gradient(loss: Any) -> Any:
    """The loss as it is, with NaN as its derivative."""
    import torch

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(context: Any, *gradients: torch.Tensor) -> Any:
            return gradients[0] * torch.nan

    return Poison.apply(loss)


STEPS, REFUSED = 4, 2
"""The step (from 0) that is refused though it is finite."""


def steps(run: EngineRun, bad: int, harmed: bool) -> list[float]:
    """Steps of which ``bad`` has a NaN in a gradient of the last rank, and REFUSED is not accepted; or the others
    alone. The gradient norms."""
    asked: list[float] = []
    backward = run.engine.backward

    def poison(loss: Any) -> None:
        # in the first of two micro-steps
        backward(nan_gradient(loss) if run.engine._left == 2 else loss)

    def accept(norm: Any) -> bool:
        asked.append(run.objective.end_step((), norm).gradient_norm)
        return math.isfinite(asked[-1]) and step != REFUSED

    for step in range(STEPS):
        if step in (bad, REFUSED) and not harmed:
            continue
        if step == bad and run.ranks.rank == run.ranks.world_size - 1:
            run.engine.backward = poison  # type: ignore[method-assign]
        run.backward(step)
        run.engine.__dict__.pop("backward", None)
        run.engine.step(RATES[step % len(RATES)], accept)
    return asked


def poisoned_steps(cases: list[tuple[int, str, str]], offload: str, bad: int) -> list[dict[str, Any]]:
    """On one rank: steps of which one has a NaN and one is refused, against those without them; what a check finds of
    weights and moments; and a norm that is not finite on the last rank alone."""
    import torch

    from pretrain.distributed import start

    ranks = start(60)
    found = []
    for case in cases:
        config = case_config(*case, offload)
        runs = [EngineRun(config, ranks) for _ in range(2)]
        asked = [steps(run, bad, harmed) for run, harmed in zip(runs, (True, False), strict=True)]
        left, reference = (run.engine.full_parameters() for run in runs)
        same = all(torch.equal(value, reference[name]) for name, value in left.items())
        seen = {"case": case, "asked": asked, "same": same, "tensors": len(left)}
        found.append({**seen, "broken": broken_weights(runs[1])})
    runs[0].objective.begin_step(0, micro_batches(0, ranks, 2))
    last = ranks.rank == ranks.world_size - 1
    found[-1]["alone"] = runs[0].objective.end_step((), math.nan if last else 1.0).gradient_norm
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "offload", "bad"),
    [(LEAN, "none", 1), campaign(ALL, "none", 0), campaign(ALL, "none", 1), campaign(ALL[2:8], "cpu", 1)],
)
def test_a_nan_in_one_ranks_gradient_leaves_the_step_out_on_all(
    cases: list[tuple[int, str, str]], offload: str, bad: int
) -> None:
    by_rank = run_on_ranks(poisoned_steps, 2, cases, offload, bad)
    for found in by_rank:
        for case in found:
            with_it, without = case["asked"]
            assert [math.isfinite(norm) for norm in with_it] == [step != bad for step in range(STEPS)], case
            assert len(without) == STEPS - 2
            assert with_it[-1] == without[-1]
            assert case["tensors"] > 10
            assert case["same"], case["case"]
            assert case["broken"]["sound"] == []
            for what in ("weights", "moment", "rounded"):
                assert case["broken"][what] == [case["broken"]["name"]], case
        assert math.isnan(found[-1]["alone"])
    assert [case["asked"][1] for case in by_rank[0]] == [case["asked"][1] for case in by_rank[1]]


def broken_weights(run: EngineRun) -> dict[str, Any]:
    """What the check finds where one element of weights or of a moment is not finite."""
    checkpoints = run.engine.checkpoints
    shard, part = next((shard, part) for shard in checkpoints._shards for part in shard.parts if part.length > 2)
    state = checkpoints._optimizer.state[shard.tensor]
    moment = next((value for value in state.values() if getattr(value, "shape", None) == shard.tensor.shape), None)
    found: dict[str, Any] = {"sound": run.engine.non_finite(), "name": part.name, "moment": [part.name]}
    broken = {"weights": (shard.tensor, math.nan), "rounded": (shard.tensor, 3.4e38), "moment": (moment, math.inf)}
    for what, (tensor, value) in broken.items():
        if tensor is not None:  # whole matrices have theirs elsewhere
            flat = tensor.detach().view(-1)
            kept = flat[part.offset + 1].clone()
            flat[part.offset + 1] = value
            found[what] = run.engine.non_finite()
            flat[part.offset + 1] = kept
    return found
