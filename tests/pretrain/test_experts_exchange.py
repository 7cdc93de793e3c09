"""The layer with its experts on several ranks against the same layer on one: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.distributed import Distributed
from pretrain.model import initialize_
from pretrain.model.experts.exchange import Exchange
from pretrain.model.experts.experts import Experts
from pretrain.model.experts.layer import MixtureOfExperts
from tests.ranks import run_on_ranks

from .test_experts import model_settings

NUMBER = 8
ALL_ON_THE_LAST = {"score": "sigmoid", "selection_bias": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "every expert": {"top_k": NUMBER},
    "no rows for all ranks but the last": ALL_ON_THE_LAST,
    "dropped slots": {"capacity": {"factor": 0.6}, "shared": 1},
    "expert choice": {"routing": "expert_choice", "normalised": False},
    "hybrid": {"routing": {"kind": "hybrid", "threshold": 0.5, "top_p": 0.7}, "entropy": {}},
}


def made(settings: dict[str, Any], across: Distributed | None, dtype: torch.dtype) -> MixtureOfExperts:
    layer = MixtureOfExperts("blocks.1.feed_forward", 1, model_settings({"number": NUMBER, **settings}), across)
    initialize_(layer, 3)
    if settings == ALL_ON_THE_LAST:
        with torch.no_grad():
            layer.router.selection_bias.copy_(torch.arange(NUMBER) * 10.0)
    layer = layer.to(dtype)
    for parameter in layer.parameters():
        parameter.requires_grad_()
    return layer


def rows_of(rank: int, dtype: torch.dtype, none_on_second: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [b, T, d], which tokens count, and what weighs the outputs: another b on each rank."""
    generator = torch.Generator().manual_seed(rank)
    shape = (0 if none_on_second and rank == 1 else 3 + rank, 7, 16)
    x, weights = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x.requires_grad_(), torch.rand(shape[:2], generator=generator) < 0.8, weights


def passed(layer: MixtureOfExperts, rank: int, dtype: torch.dtype, recompute: bool) -> dict[str, Tensor]:
    """What a forward and a backward pass over a rank's rows give."""
    # where a block is recomputed, also a rank without a token
    x, counted, weights = rows_of(rank, dtype, none_on_second=recompute)
    layer.zero_grad()
    call = (lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)) if recompute else layer
    output, routing = call(x, counted, None, True)
    (output * weights).sum().backward()
    with torch.no_grad():
        unseen, _ = layer(x, None, None)
    found = {"output": output, "evaluation": unseen, "routing": routing, "of x": x.grad}
    found |= {f"of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {name: torch.zeros(0) if value is None else value.detach().clone() for name, value in found.items()}


def there_and_back(ranks: Distributed) -> dict[str, float]:
    """Rows come back as they went, but for two without an expert; so does the gradient of their sum, which autograd
    hands on as one number for all of them, and no tensor that could be sent as it is."""
    filled = (torch.arange(14) < 12)[:, None]
    rows = torch.randn(14, 3, generator=torch.Generator().manual_seed(ranks.rank)).requires_grad_()
    ends = torch.tensor([2, 2, 5 + ranks.rank, 9, 9, 10, 11, 12], dtype=torch.int32)
    exchange = Exchange.plan(ends, ranks)
    returned = exchange.back(exchange.there(rows), len(rows))
    returned.sum().backward()
    assert rows.grad is not None
    return {"rows": apart(returned, rows * filled), "of rows": apart(rows.grad, filled.expand(14, 3).float())}


def compared(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """On one rank: for each case and way, how far outputs and gradients are from the whole layer's, relatively."""
    from pretrain.distributed import start

    ranks = start(60)
    found = {"there and back": there_and_back(ranks)}
    ways = [(torch.float64, False), (torch.float64, True), (torch.bfloat16, True)]
    for name, settings in cases.items():
        for dtype, recompute in ways:
            divided, whole = made(settings, ranks, dtype), made(settings, None, dtype)
            here, again = (passed(divided, ranks.rank, dtype, recompute) for _ in range(2))
            alone = [passed(whole, rank, dtype, recompute) for rank in range(ranks.world_size)]
            expected = dict(alone[ranks.rank])
            for key in ("of experts.gate", "of experts.up", "of experts.down"):
                summed = sum((each[key].double() for each in alone if each[key].numel()), torch.zeros(()))
                expected[key] = summed.chunk(ranks.world_size)[ranks.rank].to(dtype)
            where = f"{name}, {dtype}, recompute {recompute}"
            found[where] = {key: apart(here[key], value) for key, value in expected.items()}
            found[f"{where}, twice"] = {key: float(not torch.equal(here[key], again[key])) for key in here}
    return found


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape, (one.shape, other.shape)
    scale = float(other.double().norm()) or 1.0
    return float((one.double() - other.double()).norm()) / scale


def assert_equal_layers(world_size: int, cases: dict[str, dict[str, Any]]) -> None:
    for rank, found in enumerate(run_on_ranks(compared, world_size, cases)):
        assert found
        for where, values in found.items():
            for key, value in values.items():
                allowed = 0.0 if "twice" in where else 2e-2 if "bfloat16" in where else 1e-6
                assert value <= allowed, f"rank {rank}: {where}: {key} {value:.1e}"


def test_experts_on_two_ranks_are_those_of_one() -> None:
    assert_equal_layers(2, CASES)


@pytest.mark.campaign
def test_experts_on_four_ranks_are_those_of_one() -> None:
    assert_equal_layers(4, CASES)


def test_an_expert_starts_alike_on_whatever_rank() -> None:
    whole = made({}, None, torch.float32).experts
    for size in (2, 4):
        for rank in range(size):
            layer = MixtureOfExperts(
                "blocks.1.feed_forward",
                1,
                model_settings({"number": NUMBER}),
                Distributed(rank, size, torch.device("cpu")),
            )
            initialize_(layer, 3)
            experts: Experts = layer.experts
            for name in ("gate", "up", "down"):
                assert torch.equal(getattr(experts, name), getattr(whole, name).chunk(size)[rank])
