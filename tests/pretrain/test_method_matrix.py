"""Law 2 for every method: ZeRO stage x ranks x accumulation x recompute, each against one plain process.

The rows stand in ``tests/pretrain/methods``. By default every method runs on two ranks at every stage that it allows,
with accumulation and recompute changing from stage to stage; the whole product is a campaign.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from pretrain.config import Config
from tests.ranks import run_on_ranks

from .methods import Method, families
from .steps import relative_difference, run_engine, tiny_config

BATCH = 16
Case = tuple[int, int, str]
"""ZeRO stage, micro-steps of an optimizer step, activation checkpointing."""
Apart = list[tuple[str, dict[str, float], dict[str, float]]]
"""Cases: what it is, how far it is from the plain loop, and how far it may be."""

LEAN: list[Case] = [(0, 4, "full"), (1, 1, "full"), (2, 4, "none"), (3, 4, "full")]
WHOLE: list[Case] = [(stage, steps, kept) for stage in range(4) for steps in (1, 4) for kept in ("none", "full")]

TOLERANCES = {"gradients": 1e-5, "updates": 1e-5, "losses": 1e-5, "objectives": 1e-5, "norms": 1e-5}
"""Relative differences: of the first step's gradient and of what all steps together added to the parameters, each as
one vector; else the largest of the steps."""


def configured(method: Method, ranks: int, case: Case) -> Config:
    """The tiny configuration of a method for one case."""
    stage, micro_steps, recompute = case
    sections = {name: dict(content) for name, content in method.sections.items()}
    sections["training"] = {
        **sections.get("training", {}),
        "global_batch": BATCH,
        "micro_batch": BATCH // (micro_steps * ranks),
        "activation_checkpointing": recompute,
    }
    engine = {"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
    sections["engine"] = {**sections.get("engine", {}), **engine}
    # Adam's default eps lets the last bit of a gradient near 0 decide the sign of a whole update
    sections["optimizer"] = {"eps": 1e-4, **sections.get("optimizer", {})}
    return tiny_config(**sections)


def differences(family: str, cases: list[Case]) -> Apart:
    """On one rank, for each method and case."""
    from pretrain.distributed import start

    ranks = start(60)
    chosen = [
        (name, method, case)
        for name, method in families()[family].items()
        for case in cases
        if case[0] in method.stages
    ]
    references: dict[tuple[str, int], dict[str, Any]] = {}
    # the plain loops first: ZeRO-3 replaces torch's linear function for the whole process
    for name, method, case in chosen:
        if (name, case[1]) not in references:
            config = configured(method, ranks.world_size, (0, case[1], "none"))
            references[name, case[1]] = method.reference(config, BATCH // case[1])
    found = []
    for name, method, case in chosen:
        config = configured(method, ranks.world_size, case)
        seen, reference = run_engine(config, ranks, method.initial(config)), references[name, case[1]]
        apart = {
            "gradients": relative_difference(seen["gradients"], reference["gradients"]),
            "updates": relative_difference(added(seen, reference), added(reference, reference)),
        }
        for key in ("losses", "objectives", "norms"):
            apart[key] = max(abs(a / b - 1) for a, b in zip(seen[key], reference[key], strict=True))
        where = f"{name}: {ranks.world_size} ranks, stage {case[0]}, {case[1]} micro-steps, recompute {case[2]}"
        found.append((where, apart, {**TOLERANCES, **method.tolerances}))
    return found


def added(seen: dict[str, Any], reference: dict[str, Any]) -> dict[str, Tensor]:
    """What all steps together added to the initial parameters."""
    return {name: p - reference["initial"][name] for name, p in seen["parameters"].items()}


def too_far(found: Apart) -> list[str]:
    """What is not as near as it should be, in words."""
    return [
        f"{where}: {key} {value:.2e}"
        for where, apart, allowed in found
        for key, value in apart.items()
        if not value < allowed[key]
    ]


def assert_equal_updates(family: str, world_size: int, cases: list[Case], timeout: float = 500) -> None:
    found = run_on_ranks(differences, world_size, family, cases, timeout=timeout)[0]
    assert found
    wrong = too_far(found)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_method_makes_the_plain_update(family: str) -> None:
    assert_equal_updates(family, 2, LEAN)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("family", families())
def test_the_whole_matrix(family: str, world_size: int, stage: int) -> None:
    assert_equal_updates(family, world_size, [case for case in WHOLE if case[0] == stage], timeout=3500)
