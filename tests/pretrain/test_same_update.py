"""Law 3: recomputing or compiling a forward pass changes no update; and gradients of bf16 accumulate in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.distributed import Distributed
from pretrain.model import Decoder, initialize_
from pretrain.objective import Objective
from tests.ranks import run_on_ranks

from .steps import VOCABULARY, micro_batches, relative_difference, run_engine, tiny_config

OBJECTIVE = {"z_loss": 1e-2, "reweighting": {"strategy": "linupper", "temperature": 0.4}}


def updates(stages: list[int], training: list[dict[str, Any]], layers: int) -> list[list[dict[str, Any]]]:
    """On one rank: of every stage, what ``run_engine`` saw under each of the training settings."""
    from pretrain.distributed import start

    ranks = start(60)

    def seen(stage: int, given: dict[str, Any]) -> dict[str, Any]:
        sections = {"model": {"layers": layers}, "objective": OBJECTIVE, "training": given}
        return run_engine(tiny_config(**sections, engine={"zero_stage": stage}), ranks)

    return [[seen(stage, given) for given in training] for stage in stages]


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("losses", "objectives", "norms", "holes"):
        assert one[key] == other[key], key
    for key in ("gradients", "parameters"):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(tensor, other[key][name]) for name, tensor in one[key].items()), key


@pytest.mark.slow
def test_activation_checkpointing_changes_no_bit() -> None:
    choices = [{"activation_checkpointing": choice, "micro_batch": 2} for choice in ("none", "full")]
    for plain, recomputed in run_on_ranks(updates, 2, [1, 3], choices, 2)[0]:
        assert_same_bits(plain, recomputed)


@pytest.mark.slow
def test_compiling_changes_no_update() -> None:
    """Fused kernels round otherwise, so not to the bit; gradients first, for Adam magnifies the small ones."""
    choices = [{"micro_batch": 4, "compile": choice} for choice in (False, True)]
    ((plain, compiled),) = run_on_ranks(updates, 1, [1], choices, 1)[0]
    assert relative_difference(compiled["gradients"], plain["gradients"]) < 1e-5
    assert relative_difference(compiled["parameters"], plain["parameters"]) < 1e-4
    assert compiled["objectives"] == pytest.approx(plain["objectives"], rel=1e-5)
    assert compiled["losses"] != plain["losses"], "nothing was compiled"


def mixtures(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On one rank: what ``run_engine`` saw of a mixture of experts under each of some sections."""
    from pretrain.distributed import start

    ranks, experts = start(60), {"number": 4, "top_k": 2, "intermediate_size": 12, "shared": 1}
    model = {"layers": 1, "experts": experts}
    return [run_engine(tiny_config(model=model, **sections), ranks) for sections in changes]


@pytest.mark.slow
def test_experts_compile_and_coefficient_0_is_none() -> None:
    balance = {"kind": "load_balance", "coefficient": 0.0}
    later = {**balance, "coefficient": 0.1, "change": {"to": 0.0, "end_step": 1, "shape": "at_once"}}
    changes: list[dict[str, Any]] = [
        {"training": {"micro_batch": 4}},
        {"training": {"micro_batch": 4, "compile": True}},
        {"training": {"micro_batch": 4}, "objective": {"balancing": {"losses": [balance]}}},
        {"training": {"micro_batch": 4}, "objective": {"balancing": {"losses": [later]}}},
    ]
    plain, compiled, off, changed = run_on_ranks(mixtures, 1, changes)[0]
    assert relative_difference(compiled["gradients"], plain["gradients"]) < 1e-5
    assert relative_difference(compiled["parameters"], plain["parameters"]) < 1e-4
    assert_same_bits(plain, off)
    assert changed["objectives"][0] > plain["objectives"][0] + 0.09


def accumulated(dtype: torch.dtype) -> dict[str, Tensor]:
    """Eight micro-steps of one sequence through a bf16 decoder, their gradients summed in ``dtype``."""
    config, alone = tiny_config(), Distributed(0, 1, torch.device("cpu"))
    model = Decoder(config.model, VOCABULARY)
    initialize_(model, config.run.seed)
    model = model.to(torch.bfloat16)
    objective = Objective(config.objective, 2, alone)
    batches = micro_batches(0, alone, 1)
    assert len(batches) == 8
    objective.begin_step(0, batches)
    sums = {name: torch.zeros(p.shape, dtype=dtype) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        logits = model(batch.tokens, batch.positions, batch.document_ids, batch.single_document)
        objective.micro_step(logits, batch).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            sums[name] += p.grad.to(dtype)
    return {name: total.float() for name, total in sums.items()}


def bf16_gradients() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """Accumulated plainly in fp32, plainly in bf16, and by the engine at stages 1 to 3."""
    from pretrain.distributed import start

    ranks = start(60)
    # the references first: ZeRO-3 replaces torch's linear function for the whole process
    precise, coarse = accumulated(torch.float32), accumulated(torch.bfloat16)
    configs = {s: tiny_config(training={"precision": "bf16"}, engine={"zero_stage": s}) for s in (1, 2, 3)}
    return precise, coarse, {stage: run_engine(config, ranks)["gradients"] for stage, config in configs.items()}


def test_bf16_gradients_accumulate_in_fp32() -> None:
    """To the bit; stage 1 may round the finished sum once, for the reduction over the ranks."""
    ((precise, coarse, found),) = run_on_ranks(bf16_gradients, 1)
    rounded = {name: gradient.bfloat16().float() for name, gradient in precise.items()}
    assert relative_difference(coarse, rounded) > 1e-3
    assert min(relative_difference(found[1], precise), relative_difference(found[1], rounded)) == 0
    assert relative_difference(found[2], precise) == 0
    assert relative_difference(found[3], precise) == 0
