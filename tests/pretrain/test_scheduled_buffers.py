"""Masks that are decided on the way: on every rank and at every stage by the optimizer's fp32 weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.distributed import Distributed
from tests.ranks import run_on_ranks

from .steps import VOCABULARY, micro_batches, tiny_config

CASES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
GRADUAL = {"begin_step": 0, "end_step": 2, "every_steps": 1, "initial_sparsity": 0.3}


def masks_of(case: tuple[int, str], ranks: Distributed) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """On one rank, before each step: the masks, and the optimizer's weights that they were decided by."""
    from pretrain.engine import Engine
    from pretrain.objective import Objective

    stage, precision = case
    config = tiny_config(
        model={"linear": [{"kind": "magnitude_pruned", "sparsity": 0.7, "gradual": GRADUAL, "scope": "global"}]},
        engine={"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})},
        training={"precision": precision, "micro_batch": 4},
    )
    engine = Engine(config, VOCABULARY, ranks)
    objective = Objective(config.objective, 2, ranks)
    found = []
    for step in range(3):
        weights = engine.full_parameters()
        engine.update_buffers(step)
        found.append(({n: b.clone() for n, b in engine._engine.module.named_buffers()}, weights))
        batches = micro_batches(step, ranks, 4)
        engine.begin_step(len(batches))
        objective.begin_step(step, batches)
        for batch in batches:
            engine.backward(objective.micro_step(engine.forward(batch), batch))
        engine.step(1e-3)
    return found


def all_masks() -> list[list[tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    from pretrain.distributed import start

    ranks = start(60)
    return [masks_of(case, ranks) for case in CASES]


@pytest.mark.slow
def test_masks_are_decided_by_the_fp32_weights_and_the_same_everywhere() -> None:
    """Rounded to bf16, many weights would be equal, and others pruned."""
    one, other = run_on_ranks(all_masks, 2)
    for case, here, there in zip(CASES, one, other, strict=True):
        gone: np.ndarray | None = None
        for step, ((masks, weights), (elsewhere, _)) in enumerate(zip(here, there, strict=True)):
            assert all(torch.equal(mask, elsewhere[name]) for name, mask in masks.items())
            values = np.concatenate([weights[f"{name[:-4]}weight"].abs().numpy().ravel() for name in masks])
            values[gone if gone is not None else []] = -1.0
            count = int(len(values) * [0.3, 0.65, 0.7][step] + 1e-6)
            gone = np.lexsort((-np.arange(len(values)), values))[:count]  # of equal ones the later go first
            expected = np.ones(len(values), bool)
            expected[gone] = False
            found = np.concatenate([mask.numpy().ravel() for mask in masks.values()])
            assert (found == expected).all(), (case, step, int((found != expected).sum()))
