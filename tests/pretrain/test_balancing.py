"""The losses on routers: closed forms, derivatives, golden values, what a step leaves for the next."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.settings import build_settings
from pretrain.distributed import Distributed
from pretrain.model.experts.entropy import EntropySettings, tsallis_entropy
from pretrain.model.experts.statistics import Routing
from pretrain.objective.balancing.balancer import Balancer
from pretrain.objective.balancing.settings import BalancingSettings

ALONE = Distributed(0, 1, torch.device("cpu"))


def routing_of(logits: Tensor, top_k: int, counted: Tensor | None = None) -> Routing:
    """[1, b, ...] of one block, from logits [b, T, E], in their precision; written out."""
    batch, length, _ = logits.shape
    mask = torch.ones(batch, length, dtype=logits.dtype) if counted is None else counted.to(logits.dtype)
    p = logits.softmax(-1)
    chosen = torch.zeros_like(p).scatter(-1, logits.topk(top_k, dim=-1).indices, 1.0).detach() * mask[..., None]
    z = logits.logsumexp(-1).square() * mask
    zeros = torch.zeros(batch, dtype=logits.dtype)
    wide = chosen.sum(1), chosen.sum(1), (p * mask[..., None]).sum(1)
    packed = Routing.pack(wide, (mask.sum(1), z.sum(1), zeros, zeros, zeros)).packed
    return Routing(packed[None])


def settings_of(*losses: dict[str, Any], **more: Any) -> BalancingSettings:
    return build_settings(
        BalancingSettings, {"losses": [{"coefficient": 1.0, **each} for each in losses], **more}, "test"
    )


def value(
    parts: list[Routing],
    loss: dict[str, Any],
    saved: Any = None,
    scored: bool = True,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """The step's loss over micro-steps ``parts`` on one rank."""
    labels = sum(part.tokens[0].sum().item() for part in parts)
    settings = settings_of(loss, sample_weights=weights is not None)
    balancer = Balancer(settings, 0, labels, len(parts), ALONE, saved or {})
    own = weights or [None] * len(parts)
    if balancer.scores_first and scored:
        for part, weight in zip(parts, own, strict=True):
            balancer.score(part, weight)
    terms = []
    for part, weight in zip(parts, own, strict=True):
        by_source = torch.ones(part.packed.shape[1], 1, dtype=torch.float64)
        terms += balancer.terms(part, weight, by_source)
    return torch.stack([term.coefficient * term.numerator / term.denominator for term in terms]).sum()


BALANCE = {"kind": "load_balance"}
LEVELS = [{**BALANCE, "level": level} for level in ("sequence", "micro_batch", "global_batch")]


@pytest.mark.parametrize("loss", LEVELS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_is_one(loss: dict[str, Any], top_k: int) -> None:
    """Every expert chosen alike, and likely alike: the convention Σ f = 1."""
    logits = torch.zeros(2, 8, 8, dtype=torch.float64)
    for token in range(8):
        for place in range(top_k):
            logits[:, token, (token + place) % 8] = 1e-9
    assert value([routing_of(logits, top_k)], loss).item() == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("loss", LEVELS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_all_to_one_is_the_number_of_experts_over_k(loss: dict[str, Any], top_k: int) -> None:
    logits = torch.zeros(2, 5, 8, dtype=torch.float64)
    logits[..., 3] = 200.0
    logits[..., [0, 1, 2]] = 1.0
    assert value([routing_of(logits, top_k)], loss).item() == pytest.approx(8 / top_k, abs=1e-8)


def random_logits(rows: int, seed: int = 0) -> Tensor:
    """Every row leans towards other experts."""
    random = torch.Generator().manual_seed(seed)
    lean = 2.0 * torch.randn(rows, 1, 6, generator=random, dtype=torch.float64)
    return lean + torch.randn(rows, 10, 6, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("loss", [*LEVELS, {"kind": "router_z"}])
def test_derivatives(loss: dict[str, Any], micro_steps: int) -> None:
    """∂LBL/∂x_tj = (E/T) p_tj (f_j - Σ_i f_i p_ti); ∂L_z/∂x_tj = (2/T) lse_t p_tj. Ragged, to 1e-8 in float64, of the
    whole step at once and of each row by itself."""
    logits = random_logits(3).requires_grad_()
    counted = torch.ones(3, 10, dtype=torch.bool)
    counted[1, 4:] = False
    parts = [
        routing_of(part, 2, of) for part, of in zip(logits.chunk(micro_steps), counted.chunk(micro_steps), strict=True)
    ]
    (gradient,) = torch.autograd.grad(value(parts, loss), logits)
    x = logits.detach()
    p, tokens = x.softmax(-1), int(counted.sum())
    chosen = torch.zeros_like(p).scatter(-1, x.topk(2, dim=-1).indices, 1.0) * counted[..., None]
    if loss["kind"] == "router_z":
        expected = 2 / tokens * x.logsumexp(-1, keepdim=True) * p
    else:
        by_row = loss["level"] == "sequence" or (loss["level"] == "micro_batch" and micro_steps == 3)
        f = chosen.sum(1, keepdim=True) if by_row else chosen.sum((0, 1), keepdim=True)
        f = f / f.sum(-1, keepdim=True)
        expected = 6 / tokens * p * (f - (f * p).sum(-1, keepdim=True))
        assert gradient.sum(-1).abs().max() < 1e-12, "a shift of the logits changes nothing"
    torch.testing.assert_close(gradient, expected * counted[..., None], rtol=0, atol=1e-8)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("order", [0.5, 1.0, 1.1, 1.4, 2.0])
def test_derivative_of_the_entropy(order: float, normalised: bool) -> None:
    """∂S_q/∂x_tj = p_tj (g_tj - Σ_i g_ti p_ti) with g = -q p^(q-1) / (q - 1), or -ln p - 1 for q = 1; to 1e-8."""
    logits = random_logits(2).requires_grad_()
    settings = EntropySettings(order=order, normalised=normalised)
    (gradient,) = torch.autograd.grad(tsallis_entropy(logits.softmax(-1), settings).mean(), logits)
    p = logits.detach().softmax(-1)
    g = -p.log() - 1 if order == 1.0 else -order * p.pow(order - 1) / (order - 1)
    expected = p * (g - (g * p).sum(-1, keepdim=True)) / 20
    largest = math.log(6) if order == 1.0 else (1 - 6 ** (1 - order)) / (order - 1)
    torch.testing.assert_close(gradient, expected / (largest if normalised else 1.0), rtol=0, atol=1e-8)


def test_z_loss_golden() -> None:
    assert value(
        [routing_of(torch.zeros(2, 3, 8, dtype=torch.float64), 1)], {"kind": "router_z"}
    ).item() == pytest.approx(math.log(8) ** 2)
    assert math.log(8) ** 2 == pytest.approx(4.324077, abs=1e-6)


def three_ranks() -> list[Routing]:
    """Of algorithms.md 3.2 to 3.5 the toy example's kind: three parts that each lean to other experts."""
    logits = random_logits(6, seed=4)
    return [routing_of(logits[i : i + 2], 2) for i in (0, 2, 4)]


def test_global_is_the_mean_of_the_parts_with_the_common_frequencies() -> None:
    """Equations 4 to 6: mean_j E Σ f P^j = E Σ f P, and less than the mean of the micro-batches' own."""
    parts = three_ranks()
    whole = Routing(torch.cat([part.packed for part in parts], dim=1))
    split, joined = value(parts, BALANCE).item(), value([whole], BALANCE).item()
    counts, tokens = whole.choices.sum(1)[0], whole.tokens.sum()
    f, mean = counts / counts.sum(), whole.scores.sum(1)[0] / tokens
    assert split == pytest.approx(joined, abs=1e-12)
    assert joined == pytest.approx(6 * float(f @ mean), abs=1e-12)
    of_parts = [6 * float(f @ (part.scores.sum(1)[0] / part.tokens.sum())) for part in parts]
    assert sum(of_parts) / 3 == pytest.approx(joined, abs=1e-12)
    micro = value(parts, {**BALANCE, "level": "micro_batch"}).item()
    sequence = value(parts, {**BALANCE, "level": "sequence"}).item()
    assert joined + 0.1 < micro < sequence


def test_the_buffer_is_exact_with_one_micro_step_and_partial_with_several() -> None:
    parts = three_ranks()
    buffer = {**BALANCE, "frequencies": "buffer"}
    assert value(parts[:1], buffer).item() == pytest.approx(value(parts[:1], BALANCE).item(), abs=1e-12)
    found = value(parts, buffer).item()
    assert value(parts, BALANCE).item() < found < value(parts, {**BALANCE, "level": "micro_batch"}).item()
    counts = torch.stack([part.choices.sum(1)[0] for part in parts]).cumsum(0)
    f = counts / counts.sum(-1, keepdim=True)
    expected = sum(6 * float(f[j] @ (part.scores.sum(1)[0] / part.tokens.sum())) / 3 for j, part in enumerate(parts))
    assert found == pytest.approx(expected, abs=1e-12)
    assert value(parts, buffer).item() == found, "the next step does not see the counts of this one"


def test_frequencies_of_earlier_steps() -> None:
    parts = three_ranks()
    balance = {**BALANCE, "frequencies": "previous_step"}
    first = value(parts, balance)
    assert first.item() == pytest.approx(1.0, abs=1e-12), "uniform, which has no gradient"
    f = [[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]]
    whole = torch.cat([part.scores for part in parts], dim=1).sum(1)[0] / 60
    assert value(parts, balance, {"global_batch_previous_step": f}).item() == pytest.approx(
        6 * float(torch.tensor(f[0], dtype=torch.float64) @ whole), abs=1e-12
    )


def test_what_a_step_leaves_for_the_next() -> None:
    settings = settings_of(
        {**BALANCE, "frequencies": "previous_step"},
        {**BALANCE, "frequencies": "running", "decay": 0.75, "coefficient": 0.5},
    )
    saved: dict[str, list[list[float]]] = {}
    means = []
    for step, part in enumerate(three_ranks()):
        balancer = Balancer(settings, step, 20.0, 1, ALONE, saved)
        balancer.terms(part, None, torch.ones(2, 1, dtype=torch.float64))
        statistics = balancer.statistics(balancer.collected().numpy())
        assert statistics is not None
        saved = statistics.frequencies
        means.append((part.choices.sum(1) / part.choices.sum()).numpy())
    assert saved.keys() == {"global_batch_previous_step", "global_batch_running"}
    np.testing.assert_allclose(saved["global_batch_previous_step"], means[2], atol=1e-12)
    running = 0.75 * (0.75 * means[0] + 0.25 * means[1]) + 0.25 * means[2]
    np.testing.assert_allclose(saved["global_batch_running"], running, atol=1e-12)


def test_what_is_remembered_begins_before_the_loss_and_outlives_a_step_of_holes() -> None:
    later = {"to": 1.0, "end_step": 5, "shape": "at_once"}
    ways = [{"frequencies": "previous_step"}, {"frequencies": "running", "decay": 0.75}]
    settings = settings_of(*({**BALANCE, **way, "coefficient": 0.0, "change": later} for way in ways))
    part, saved = three_ranks()[0], {}
    for step, routing in enumerate((part, Routing(torch.zeros_like(part.packed)))):
        balancer = Balancer(settings, step, 20.0, 1, ALONE, saved)
        assert balancer.terms(routing, None, torch.ones(2, 1, dtype=torch.float64)) == []
        statistics = balancer.statistics(balancer.collected().numpy())
        assert statistics is not None
        saved = statistics.frequencies
        assert saved.keys() == {"global_batch_previous_step", "global_batch_running"}
        for found in saved.values():
            np.testing.assert_allclose(found, part.choices.sum(1) / part.choices.sum(), atol=1e-12)


def test_sample_weights_weigh_rows_and_frequencies() -> None:
    """A row of weight 2 counts as if it were there twice, one of weight 0 not at all, over the same labels."""
    logits = random_logits(4)
    weights = torch.tensor([2.0, 1.0, 0.0, 1.0])
    repeated = routing_of(logits[[0, 0, 1, 3]], 2)
    for loss in (*LEVELS, {"kind": "router_z"}):
        weighed = value([routing_of(logits, 2)], loss, weights=[weights]).item()
        assert weighed == pytest.approx(value([repeated], loss).item(), abs=1e-12), loss
    split = [routing_of(logits[:2], 2), routing_of(logits[2:], 2)]
    found = value(split, BALANCE, weights=[weights[:2], weights[2:]]).item()
    assert found == pytest.approx(value([repeated], BALANCE).item(), abs=1e-12)


def test_layers_are_summed_and_never_pooled() -> None:
    one, other = three_ranks()[:2]
    stacked = Routing(torch.cat([one.packed, other.packed]))
    balancer = Balancer(settings_of(BALANCE), 0, 20.0, 1, ALONE, {})
    (term,) = balancer.terms(stacked, None, torch.ones(2, 1, dtype=torch.float64))
    apart = value([one], BALANCE) + value([other], BALANCE)
    assert float(term.numerator / term.denominator) == pytest.approx(apart.item(), abs=1e-12)
    statistics = balancer.statistics(balancer.collected().numpy())
    assert statistics is not None
    assert statistics.losses == {"global_batch": pytest.approx(apart.item() / 2, abs=1e-12)}


def test_coefficient_0_is_none() -> None:
    balancer = Balancer(settings_of({**BALANCE, "coefficient": 0.0}), 0, 20.0, 4, ALONE, {})
    assert not balancer.scores_first
    assert balancer.terms(three_ranks()[0], None, torch.ones(2, 1, dtype=torch.float64)) == []
