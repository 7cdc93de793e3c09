"""Expert parallelism makes the update of one process on the concatenated batch: ZeRO stage x groups x accumulation x
recompute. The gradient is clipped in every step, so that an update is right only if the norm of both groups is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.config import Config
from pretrain.costs import memory
from pretrain.engine import deepspeed_config
from pretrain.plan_experts import expert_communication, show_expert_communication
from tests.ranks import run_on_ranks

from .methods import Method
from .methods.experts import EXPERTS, METHODS, balanced, experts, losses
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
METHOD: dict[str, Method] = {
    "balanced": balanced({"shared": 1, "jitter": 0.1}, losses({}, {"level": "sequence"})),
    "ranks without a row": replace(balanced(ALL_ON_THE_LAST, {"bias": {"rate": 0.05}}), initial=lambda config: BIASED),
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
    "muon": METHODS["muon"],
    "galore": METHODS["galore"],
}
Case = tuple[str, int, int, int, str, dict[str, Any]]
"""Method, ZeRO stage, expert-parallel ranks, micro-steps, activation checkpointing, further settings."""

LEAN: list[Case] = [
    ("balanced", 0, 2, 2, "full", {}),
    ("scoring pass", 1, 4, 1, "none", {}),
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
PLANNED: list[Case] = [
    ("balanced", 0, 2, 1, "none", {}),
    ("scoring pass", 1, 2, 2, "full", {"precision": "bf16"}),
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
        **{key: value for key, value in further.items() if key in ("precision", "compile")},
    }
    engine = {key: value for key, value in further.items() if key not in training}
    sections["training"] = {**sections.get("training", {}), **training}
    sections["engine"] = {"zero_stage": stage, "expert_parallel": size, **engine}
    sections["optimizer"] = {"eps": 1e-4, **sections.get("optimizer", {})}
    return tiny_config(**sections)


def differences(cases: list[Case]) -> Apart:
    """On one rank, for each case."""
    from pretrain.distributed import start

    ranks = start(60)
    references: dict[tuple[str, int, str], dict[str, Any]] = {}
    found = []
    for case in cases:
        method, config = METHOD[case[0]], configured(case, ranks.world_size)
        key = (case[0], case[3], config.training.precision)
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


def assert_equal_updates(world_size: int, cases: list[Case], timeout: float = 500) -> None:
    everybodys = run_on_ranks(differences, world_size, cases, timeout=timeout)
    for rank, found in enumerate(everybodys):
        assert len(found) == len(cases)
        wrong = too_far(found)
        assert not wrong, f"rank {rank}:\n" + "\n".join(wrong)


@pytest.mark.slow
def test_divided_experts_make_the_plain_update() -> None:
    assert_equal_updates(4, LEAN)


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


def evaluated_and_counted() -> tuple[list[float], list[tuple[int, int]], list[tuple[int, int]]]:
    """On one of two ranks: an evaluation of other rows on each rank, by whole experts and by divided ones; and for some
    cases what a step sends, all-to-alls and bytes of rows and of counts, what the rank holds, bytes of weights and at
    stage 0 of optimizer state, and what the plan says of both."""
    from pretrain.distributed import start

    ranks = start(60)
    found, seen, told = [], [], []
    plain = dist.all_to_all_single

    def counted(received: Tensor, sent: Tensor, *arguments: Any, **options: Any) -> None:
        moved.append((sent.dtype, sent.numel() * sent.element_size()))
        plain(received, sent, *arguments, **options)

    for size in (1, 2):
        run = EngineRun(configured(("balanced", 1, size, 1, "none", {}), 2), ranks)
        run.engine.evaluating(True)
        with torch.no_grad():
            own = [batch_of(0, rows) for rows in ((torch.arange(5).numpy(), torch.arange(1).numpy())[ranks.rank],)]
            found += [float(run.engine.forward(batch).float().square().mean()) for batch in own]
    moved: list[tuple[torch.dtype, int]] = []
    for case in PLANNED:
        config = configured(case, 2)
        run = EngineRun(config, ranks)
        moved.clear()
        dist.all_to_all_single = counted
        run.step(0)
        dist.all_to_all_single = plain
        rows = [size for dtype, size in moved if dtype != torch.int32]
        plan = expert_communication(config, 2)
        assert plan is not None
        scored = case[0] == "scoring pass"
        # of what both ranks send, half is for the senders themselves when experts are balanced
        sent = int(ranks.all_reduce(torch.tensor(sum(rows))))
        seen += [(len(rows), sent // 2 // 2), (len(moved) - len(rows), 0)]
        told += [
            (
                plan["all_to_alls"] + scored * plan["scoring_all_to_alls"],
                plan["bytes"] + scored * plan["scoring_bytes"],
            ),
            (plan["counts"] + scored * plan["scoring_all_to_alls"] // 2, 0),
        ]
        module, costs = run.engine._engine.module, memory(config, VOCABULARY, 2)
        state = [value for each in run.engine._optimizer.state.values() for value in each.values() if value.dim()]
        of_weights = sum(p.numel() * p.element_size() for p in module.parameters())
        seen.append((of_weights, 4 * sum(map(torch.numel, state)) if config.engine.zero_stage == 0 else 0))
        told.append((costs["weights_of_a_rank"], costs["optimizer_state_of_a_rank"] * (config.engine.zero_stage == 0)))
    return found, seen, told


def test_unequal_batches_and_what_moves() -> None:
    for (whole, divided), seen, told in run_on_ranks(evaluated_and_counted, 2):
        assert divided == pytest.approx(whole, rel=1e-6)
        assert seen == told


def test_the_plan_for_people() -> None:
    config = configured(("balanced", 2, 2, 4, "full", {}), 4)
    assert show_expert_communication(expert_communication(config, 4)) == [
        "experts       2 of each block on a rank, in groups of 2 ranks",
        # 2 blocks x 4 micro-steps x 3 passes there and back, of 24 tokens x 2 slots x 32 features x 4 bytes, a half
        "exchange      48 all-to-alls of rows a step, 0.147 MB out of a rank when balanced, and 16 of counts; "
        "a scoring pass would add 16, 0.0492 MB",
    ]
    assert show_expert_communication(expert_communication(configured(("balanced", 2, 1, 4, "full", {}), 4), 4)) == []


def refused(size: int, **sections: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        tiny_config(**{**sections, "engine": {**sections.get("engine", {}), "expert_parallel": size}})
    return str(caught.value)


def test_what_can_not_be_divided_is_refused_before_any_work() -> None:
    model = experts({}).sections["model"]
    assert "model.experts is null; leave it out" in refused(2)
    assert "does not divide model.experts.number 4; 1, 2, 4 do" in refused(3, model=model)
    assert "at zero_stage 3" in refused(2, model=model, engine={"zero_stage": 3})
    message = refused(2, model=model, engine={"zero_stage": 0}, training={"precision": "bf16"})
    assert "leaves such experts out of the gradient's norm at zero_stage 0 in bf16" in message
    assert "'engine.expert_parallel' = 0" in refused(0)
    config = tiny_config(model=model, engine={"zero_stage": 2, "expert_parallel": 4})
    for ranks, fitting in ((6, "1, 2"), (1, "1"), (2, "1, 2")):
        with pytest.raises(UserError, match=rf"this run's {ranks} ranks are no multiple .* to one of {fitting}\."):
            deepspeed_config(config, ranks)
    contrary = {"zero_optimization": {"reduce_scatter": False}}
    config = tiny_config(model=model, engine={"zero_stage": 2, "expert_parallel": 2, "deepspeed": contrary})
    with pytest.raises(UserError, match=r"zero_optimization\.reduce_scatter = False contradicts"):
        deepspeed_config(config, 2)
