"""Expert parallelism makes the update of one process on the concatenated batch: ZeRO stage x groups x accumulation x
recompute. The gradient is clipped in every step, so that an update is right only if the norm of both groups is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.distributed import Distributed
from pretrain.model import Decoder, initialize_
from pretrain.model.experts.statistics import Routing
from tests.ranks import run_on_ranks

from .methods import Method
from .methods.experts import EXPERTS, METHODS, balanced, losses
from .steps import (
    VOCABULARY,
    EngineRun,
    batch_of,
    relative_difference,
    run_engine,
    tiny_config,
)
from .test_method_matrix import BATCH, Apart, added, too_far

ALL_ON_THE_LAST = {"score": "sigmoid", "selection_bias": True}
BIASED = {f"blocks.{n}.feed_forward.router.selection_bias": 10.0 * torch.arange(4) for n in range(2)}
GIVEN = {
    "blocks.1.feed_forward.experts.up": torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(5))
    .bfloat16()
    .float()
}
"""Initial values of some experts, which bf16 has too; the others are drawn."""
METHOD: dict[str, Method] = {
    "balanced": balanced({"shared": 1, "jitter": 0.1}, losses({}, {"level": "sequence"})),
    "ranks without a row": replace(
        balanced(ALL_ON_THE_LAST, {"bias": {"rate": 0.05}}), initial=lambda config: {**BIASED, **GIVEN}
    ),
    "bias among groups": METHODS["bias among groups"],
    "hybrid": METHODS["hybrid"],
    "expert choice": METHODS["expert choice"],
    "scoring pass": METHODS["sample weights"],
    "all that changes the choice": METHODS["all that changes the choice"],
    "every loss": METHODS["every loss"],
    "one pass": METHODS["one pass"],
    "shared in parts": Method(
        {
            "model": {
                "experts": {**EXPERTS, "shared": 1},
                "linear": [{"kind": "cola", "rank": 6, "modules": ["feed_forward.shared.*"]}],
            }
        }
    ),
    "muon": replace(METHODS["muon"], initial=lambda config: GIVEN),
    "galore": METHODS["galore"],
}
Case = tuple[str, int, int, int, str, dict[str, Any]]
"""Method, ZeRO stage, expert-parallel ranks, micro-steps, activation checkpointing, further settings."""

RAMP = [{"steps": 1, "global_batch": BATCH // 2}]
LEAN: list[Case] = [
    ("balanced", 0, 2, 4, "full", {}),  # in the second step a hole is the last rank's whole micro-batch
    ("scoring pass", 1, 4, 1, "none", {}),
    ("one pass", 2, 2, 2, "none", {"batch_ramp": RAMP}),
    ("bias among groups", 1, 4, 2, "none", {}),
    ("ranks without a row", 1, 2, 2, "full", {}),
    ("every loss", 2, 2, 1, "full", {}),
    ("muon", 2, 4, 2, "none", {"precision": "bf16"}),
    ("hybrid", 1, 2, 1, "full", {}),
    ("expert choice", 2, 4, 1, "none", {}),
    ("galore", 1, 2, 1, "none", {}),
]
OTHERS: list[Case] = [
    ("balanced", 1, 2, 2, "full", {"offload_optimizer": "cpu"}),
    ("balanced", 2, 2, 2, "full", {"offload_optimizer": "cpu"}),
    ("balanced", 2, 2, 2, "none", {"overlap_communication": True, "bucket_elements": 2000}),
    ("balanced", 1, 2, 2, "none", {"compile": True}),
    ("shared in parts", 2, 2, 2, "low_rank", {}),
]
TOLERANCES = {
    "fp32": {"gradients": 1e-6, "updates": 1e-5, "parameters": 1e-6, "losses": 1e-6, "norms": 1e-5},
    "bf16": {"gradients": 3e-2, "updates": 0.2, "parameters": 1e-2, "losses": 1e-2, "norms": 0.1},
}
"""Relative differences, of vectors or the largest of the steps; of ``parameters`` the largest of any element, not
relative. In bf16 a rounded gradient may turn the sign of one of Adam's updates."""


def configured(case: Case, world_size: int) -> Config:
    name, stage, size, micro_steps, recompute, further = case
    sections = {section: dict(content) for section, content in METHOD[name].sections.items()}
    training = {
        "global_batch": BATCH,
        "micro_batch": BATCH // (micro_steps * world_size),
        "activation_checkpointing": recompute,
        **{key: value for key, value in further.items() if key in ("precision", "compile", "batch_ramp")},
    }
    engine = {key: value for key, value in further.items() if key not in training}
    sections["training"] = {**sections.get("training", {}), **training}
    sections["engine"] = {"zero_stage": stage, "expert_parallel": size, **engine}
    sections["optimizer"] = {"eps": 1e-4, **sections.get("optimizer", {})}
    return tiny_config(**sections)


def differences(cases: list[Case], ranks: Distributed) -> Apart:
    """On one rank, for each case."""
    references: dict[Any, dict[str, Any]] = {}
    found = []
    for case in cases:
        method, config = METHOD[case[0]], configured(case, ranks.world_size)
        key = (case[0], case[3], config.training.precision, config.training.batch_ramp)
        if key not in references:
            references[key] = method.reference(config, BATCH // case[3])
        seen, reference = run_engine(config, ranks, method.initial(config)), references[key]
        assert min(reference["norms"]) > config.optimizer.clip_norm > 0
        apart = {
            "gradients": relative_difference(seen["gradients"], reference["gradients"]),
            "updates": relative_difference(added(seen, reference), added(reference, reference)),
            "parameters": largest_difference(seen["parameters"], reference["parameters"]),
        }
        for name in ("losses", "norms"):
            apart[name] = max(abs(a / b - 1) for a, b in zip(seen[name], reference[name], strict=True))
        allowed = dict(TOLERANCES[config.training.precision])
        if config.training.compile:
            allowed["gradients"] = 1e-5  # fused kernels round otherwise
        found.append((f"{ranks.world_size} ranks, {case}", apart, allowed))
    return found


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in other)


def alone(cases: list[Case]) -> Apart:
    from pretrain.distributed import start

    return differences(cases, start(60))


def assert_equal_updates(world_size: int, cases: list[Case], timeout: float = 500) -> None:
    everybodys = run_on_ranks(alone, world_size, cases, timeout=timeout)
    for rank, found in enumerate(everybodys):
        assert_near(rank, found, cases)


def assert_near(rank: int, found: Apart, cases: list[Case]) -> None:
    assert len(found) == len(cases)
    wrong = too_far(found)
    assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


CAPACITY = balanced({"capacity": {"factor": 0.7}, "shared": 1}, losses({}))
SPLITS = [(1, 4), (2, 1), (4, 4)]
"""Expert-parallel ranks, micro-steps: several need a scoring pass before, and of four one is empty on one rank."""


def dropped(ranks: Distributed) -> list[tuple[list[int], list[list[int]]]]:
    """On one rank: the slots that a step has dropped and had, [L] and [L, E], for each split; then on one process."""
    found = []
    for size, micro_steps in SPLITS:
        training = {"global_batch": BATCH, "micro_batch": BATCH // (micro_steps * ranks.world_size)}
        engine = {"zero_stage": 1, "expert_parallel": size}
        config = tiny_config(**{**CAPACITY.sections, "training": training, "engine": engine})
        run = EngineRun(config, ranks)
        run.backward(1)
        routing = run.update(1)[1].routing
        assert routing is not None
        found.append((routing.dropped.tolist(), routing.loads.sum(axis=1).tolist()))
    model, batch = Decoder(config.model, VOCABULARY), batch_of(1, np.arange(BATCH), BATCH)
    initialize_(model, config.run.seed)
    inputs = (batch.tokens, batch.positions, batch.document_ids, batch.single_document, batch.loss_mask)
    whole = Routing(model(*inputs, of_step=True).routing)
    return [*found, (whole.dropped.sum(1).tolist(), whole.loads.sum(1).tolist())]


def lean() -> tuple[Apart, Any]:
    from pretrain.distributed import start

    ranks = start(60)
    return differences(LEAN, ranks), dropped(ranks)


@pytest.mark.slow
def test_divided_experts_make_the_plain_update_and_drop_the_same() -> None:
    for rank, (found, (*splits, whole)) in enumerate(run_on_ranks(lean, 4)):
        assert_near(rank, found, LEAN)
        assert min(whole[0]) > 0
        assert splits == [whole] * len(SPLITS)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", METHOD)
def test_the_whole_matrix(name: str, world_size: int, stage: int) -> None:
    cases: list[Case] = [
        (name, stage, size, micro_steps, recompute, {"precision": precision})
        for size in (2, 4)
        for micro_steps in (1, 4)
        for recompute in ("none", "full")
        for precision in ("fp32", "bf16")
        if size <= world_size and not (stage == 0 and precision == "bf16")
    ]
    assert_equal_updates(world_size, cases, timeout=3500)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_with_other_settings_of_the_engine() -> None:
    assert_equal_updates(4, OTHERS, timeout=3500)
