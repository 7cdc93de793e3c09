"""Global-batch balancing on ranks x accumulation x activation checkpointing of either kind against one process that has
the whole batch: the loss, its gradient, the counts and the bias (laws 2 and 3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import Config
from tests.marks import campaign
from tests.ranks import run_on_ranks

from .methods.experts import PlainBalancing, losses
from .steps import STEPS, EngineRun, relative_difference, run_plain, tiny_config

BATCH = 16
CASES = [(micro_steps, kept) for micro_steps in (1, 4) for kept in ("none", "full", "reentrant")]


def configured(world_size: int, micro_steps: int, recompute: str) -> Config:
    return tiny_config(
        model={
            "experts": {"number": 4, "top_k": 2, "intermediate_size": 12, "score": "sigmoid", "selection_bias": True}
        },
        objective={"balancing": {**losses({"coefficient": 1.0}), "bias": {"rate": 0.05}}},
        optimizer={"eps": 1e-4},
        training={
            "global_batch": BATCH,
            "micro_batch": BATCH // (micro_steps * world_size),
            "activation_checkpointing": "none" if recompute == "reentrant" else recompute,
        },
    )


def reentrant(block: nn.Module, how: str, *inputs: Any) -> Any:
    return checkpoint(block, *inputs, use_reentrant=True)


def seen_on(config: Config, ranks: Any) -> dict[str, Any]:
    run = EngineRun(config, ranks)
    found: dict[str, Any] = {"losses": [], "loads": [], "objectives": []}
    for step in range(STEPS):
        run.backward(step)
        if step == 0:
            found["gradients"] = run.engine.full_gradients()
        _, statistics = run.update(step)
        assert statistics.routing is not None
        found["losses"].append(statistics.routing.losses["global_batch"])
        found["loads"].append(statistics.routing.loads)
        found["objectives"].append(statistics.objective)
    found["parameters"], found["bias"] = run.engine.full_parameters(), run.engine.selection_bias()
    return found


class Recording(PlainBalancing):
    """Keeps what the reference saw beside what it minimised."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.bias = torch.zeros(0)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        total = super().__call__(*arguments)
        self.values.append(total.item() / len(arguments[0]))  # its coefficient is 1
        return total

    def end_step(self, model: Any, *rest: Any) -> None:
        super().end_step(model, *rest)
        self.bias = torch.stack([block.feed_forward.router.selection_bias for block in model.blocks]).clone()


def apart(_: None = None) -> list[tuple[str, dict[str, float]]]:
    """On one rank, for each case: how far it is from the one process."""
    from pretrain.distributed import start
    from pretrain.model import decoder

    ranks = start(60)
    balancing = Recording()
    plain = run_plain(configured(ranks.world_size, 1, "none"), BATCH, balancing=balancing)
    found, usual, loads = [], decoder.run_block, None
    for micro_steps, recompute in CASES:
        decoder.run_block = reentrant if recompute == "reentrant" else usual  # type: ignore[assignment]
        seen = seen_on(configured(ranks.world_size, micro_steps, recompute), ranks)
        loads = loads or seen["loads"]
        found.append(
            (
                f"{ranks.world_size} ranks, {micro_steps} micro-steps, recompute {recompute}",
                {
                    "loss": max(abs(a / b - 1) for a, b in zip(seen["losses"], balancing.values, strict=True)),
                    "gradients": relative_difference(seen["gradients"], plain["gradients"]),
                    "bias": float((seen["bias"] - balancing.bias).abs().max()),
                    "counts": float(sum(np.abs(a - b).sum() for a, b in zip(seen["loads"], loads, strict=True))),
                },
            )
        )
        assert seen["bias"].abs().max() > 0.04
    return found


@pytest.mark.parametrize("world_size", [1, campaign(2), pytest.param(4, marks=pytest.mark.slow)])
def test_one_process_balances_the_same(world_size: int) -> None:
    found = run_on_ranks(apart, world_size, None)[0]
    assert len(found) == len(CASES)
    wrong = [f"{where}: {key} {size:.1e}" for where, each in found for key, size in each.items() if size > 1e-6]
    assert not wrong, "\n".join(wrong)


def after_looking(_: None = None) -> tuple[Any, Any]:
    """A step with an evaluation between its micro-steps, and one without."""
    from pretrain.distributed import start

    ranks, found = start(60), []
    for looks in (True, False):
        run = EngineRun(configured(1, 4, "full"), ranks)
        forward = run.engine.training_forward

        def looking(batch: Any, forward: Any = forward, engine: Any = run.engine) -> Any:
            engine.evaluating(True)
            with torch.no_grad():
                engine.forward(batch)
            engine.evaluating(False)
            return forward(batch)

        if looks:
            run.engine.training_forward = looking  # type: ignore[method-assign]
        run.backward(0)
        _, statistics = run.update(0)
        routing = statistics.routing
        assert routing is not None
        found.append((routing.loads.tolist(), routing.losses, run.engine.selection_bias().tolist()))
    return found[0], found[1]


def test_an_evaluation_counts_nothing() -> None:
    ((with_evaluations, without),) = run_on_ranks(after_looking, 1, None)
    assert with_evaluations == without
