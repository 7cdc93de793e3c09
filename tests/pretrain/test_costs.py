"""What a plan says that a run takes, against the tensors that engines of that run hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.config import Config
from pretrain.costs import memory, parts
from pretrain.distributed import Distributed
from pretrain.model import activation_bytes, count_parameters, flops_per_token, initialize
from pretrain.model.linear.kinds import lost
from tests.ranks import run_on_ranks

from .steps import LENGTH, VOCABULARY, micro_batches, tiny_config

LINEAR = [
    {"kind": "lost", "rank": 6, "column_fraction": 0.2, "modules": ["attention.*"]},
    {"kind": "cola", "rank": 6, "modules": ["feed_forward.*"], "layers": "1"},
]
CASES = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def config(stage: int = 1, precision: str = "bf16", **sections: dict[str, Any]) -> Config:
    engine = {"zero_stage": stage, **({"persistence_threshold": 0} if stage == 3 else {})}
    training = {"precision": precision, "micro_batch": 2}
    return tiny_config(**{"model": {"linear": LINEAR}, "engine": engine, "training": training, **sections})


def by_name(settings: Config) -> dict[str, Any]:
    return {part.name: part for part in parts(settings, VOCABULARY)}


def test_the_parts_add_up() -> None:
    for tied in (False, True):
        settings = config(model={"linear": LINEAR, "tied_embeddings": tied})
        found, model = by_name(settings), settings.model
        assert list(found) == ["embedding", "linear.0 (lost)", "linear.1 (cola)", "dense", "norms", "head"]
        assert sum(part.parameters for part in found.values()) == count_parameters(model, VOCABULARY).total
        attention = 12 * 2 * 4 * 8 * LENGTH
        assert (
            sum(part.flops_per_token for part in found.values())
            == flops_per_token(model, VOCABULARY, LENGTH) - attention
        )
        assert (found["linear.0 (lost)"].layers, found["linear.1 (cola)"].layers, found["dense"].layers) == (8, 3, 3)
        # rank 6: query and output 32 x 32, key and value 32 x 16; each 6 of 32 columns, an index of 8 bytes
        assert found["linear.0 (lost)"].parameters == 2 * (2 * (6 * 64 + 6 * 32) + 2 * (6 * 48 + 6 * 16))
        assert found["linear.0 (lost)"].buffer_bytes == 2 * 4 * 6 * 8
        assert found["dense"].parameters == 3 * 32 * 48
        assert found["head"].parameters == (0 if tied else VOCABULARY * 32)
        assert found["norms"].parameters == 5 * 32
        assert found["dense"].optimizer_bytes == 12 * found["dense"].parameters, "two moments and a copy in fp32"


def test_the_parts_of_a_mixture_add_up() -> None:
    mixture = {"number": 8, "top_k": 2, "intermediate_size": 12, "shared": 2, "dense_first": 1, "selection_bias": True}
    settings = config(model={"experts": mixture, "linear": []}, objective={"balancing": {"bias": {}}})
    found, model = by_name(settings), settings.model
    assert list(found) == ["embedding", "dense", "experts", "routers", "norms", "head"]
    assert sum(part.parameters for part in found.values()) == count_parameters(model, VOCABULARY).total
    whole = flops_per_token(model, VOCABULARY, LENGTH) - 12 * 2 * 4 * 8 * LENGTH
    assert sum(part.flops_per_token for part in found.values()) == whole
    assert found["experts"].parameters == 8 * 3 * 32 * 12
    assert found["experts"].flops_per_token == 6 * 2 * 3 * 32 * 12
    assert (found["routers"].parameters, found["routers"].flops_per_token) == (8 * 32, 6 * 8 * 32)
    assert found["routers"].buffer_bytes == 8 * 4
    assert (found["dense"].layers, found["dense"].parameters) == (14, 2 * 3072 + 3 * 32 * 48 + 2 * 3 * 32 * 12)


def test_a_head_of_moments_has_its_work_by_token_and_by_step() -> None:
    plain, other = config(), config(objective={"loss": "spherical_z"})
    found, before = by_name(other), by_name(plain)
    assert (found["head"].flops_per_token, found["head"].flops_per_step) == (6 * 32**2, 4 * VOCABULARY * 32**2)
    assert before["head"].flops_per_step == 0
    attention = 12 * 2 * 4 * 8 * LENGTH
    of_tokens = sum(part.flops_per_token for part in found.values())
    assert of_tokens == flops_per_token(other.model, VOCABULARY, LENGTH, from_moments=True) - attention
    large = [memory(each, 10**6, 1)["activations"]["full"]["token"] for each in (other, plain)]
    assert large[0] == memory(other, 10**3, 1)["activations"]["full"]["token"]
    assert large[0] < large[1] / 100


def held() -> list[tuple[int, int]]:
    """On one rank, of each case after a step: bytes of the optimizer's state and fp32 copy, and of the buffers."""
    from pretrain.distributed import start

    ranks = start(60)
    return [held_by_engine(config(stage, precision), ranks) for stage, precision in CASES]


def held_by_engine(settings: Config, ranks: Distributed) -> tuple[int, int]:
    from pretrain.engine import Engine
    from pretrain.objective import Objective

    engine, objective = Engine(settings, VOCABULARY, ranks), Objective(settings.objective, 2, ranks)
    batches = micro_batches(0, ranks, 2)
    engine.begin_step(len(batches))
    objective.begin_step(0, batches)
    for batch in batches:
        engine.backward(objective.micro_step(engine.forward(batch), batch))
    engine.step(1e-3)
    zero = engine._optimizer
    optimizer = getattr(zero, "optimizer", zero)
    weights = {p.untyped_storage().data_ptr() for p in engine._engine.module.parameters()}
    state = sum(
        tensor.numel() * 4
        for moments in optimizer.state.values()
        for tensor in moments.values()
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 1
    )
    # between two steps stage 3 takes its copies out of the groups
    copies = getattr(zero, "fp32_partitioned_groups_flat", None) or [
        tensor for group in optimizer.param_groups for tensor in group["params"]
    ]
    masters = sum(tensor.numel() * 4 for tensor in copies if tensor.untyped_storage().data_ptr() not in weights)
    return state + masters, sum(b.numel() * b.element_size() for b in engine._engine.module.buffers())


@pytest.mark.slow
def test_optimizer_state_and_buffers_are_what_ranks_hold() -> None:
    for seen in run_on_ranks(held, 2):
        for (stage, precision), (state, buffers) in zip(CASES, seen, strict=True):
            told = memory(config(stage, precision), VOCABULARY, 2)
            # DeepSpeed pads its flat groups
            assert state == pytest.approx(told["optimizer_state_of_a_rank"], rel=0.01), (stage, precision)
            assert buffers == told["buffers"]


def test_planning_draws_and_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: object) -> None:
        raise AssertionError("a plan made initial values")

    monkeypatch.setattr(lost, "singular_triplets", unexpected)
    monkeypatch.setattr(initialize, "normal", unexpected)
    shape = {"hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": None, "intermediate_size": 11008}
    rules = [{"kind": "lost", "rank": 1024}]
    settings = config(model={**shape, "linear": rules})
    # r (m + n) + 40 m, or + 110 m where the 11008 features are the inputs
    layer = 4 * (1024 * 8192 + 40 * 4096) + 2 * (1024 * 15104 + 40 * 11008) + 1024 * 15104 + 110 * 4096
    assert by_name(settings)["linear.0 (lost)"].parameters == 32 * layer
    assert memory(settings, VOCABULARY, 2)["buffers"] == 8 * 32 * (6 * 40 + 110)


def test_activations_are_told_for_every_choice() -> None:
    told = memory(config(), VOCABULARY, 2)["activations"]
    assert list(told) == ["none", "full", "low_rank"]
    for how, peak in told.items():
        assert peak["token"] == activation_bytes(config().model, VOCABULARY, LENGTH, 2, how).peak
        assert peak["micro_batch"] == peak["token"] * 2 * LENGTH
    plain = config(model={}, objective={"z_loss": 0.1})
    assert list(memory(plain, VOCABULARY, 2)["activations"]) == ["none", "full"]
    of_loss = activation_bytes(plain.model, VOCABULARY, LENGTH, 2, "full", z_loss=True).peak
    assert memory(plain, VOCABULARY, 2)["activations"]["full"]["token"] == of_loss
