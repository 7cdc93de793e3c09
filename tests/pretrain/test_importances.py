"""Strategies that give importances themselves, without a range: of sequences and of tokens, in every group."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.objective import ObjectiveSettings, ProbabilitySettings, ReweightingSettings
from pretrain.objective.reweighting import token_weights

from .steps import GLOBAL_BATCH, batch_of
from .test_sample_groups import GROUPS, found_weights, logits_of, plain_losses, take_step


class Doubtful(ProbabilitySettings):
    """Importances 1 - p."""

    kind: Literal["doubtful"] = "doubtful"

    def log_importances(self, losses: Tensor, lowest: Tensor, highest: Tensor, temperature: float) -> Tensor:
        return (-losses).exp().neg().log1p()


def chosen(average: str = "token", tokens: bool = False, **given: Any) -> ObjectiveSettings:
    reweighting = ReweightingSettings.model_construct(strategy=Doubtful(of="token" if tokens else "sequence"), **given)
    return ObjectiveSettings.model_construct(average=average, reweighting=reweighting)


@pytest.mark.parametrize("micro_steps", [1, 4])
@pytest.mark.parametrize("group", ["global_batch", "global_batch_one_pass"])
def test_without_a_range_the_first_step_of_one_pass_is_exact(group: str, micro_steps: int) -> None:
    losses, counts = plain_losses(1)
    importances = 1 - np.exp(-losses)
    expected = importances * counts.sum() / (importances * counts).sum() * (counts > 0)
    outcome = take_step(chosen(group=group), micro_steps)
    assert found_weights(outcome.statistics) == pytest.approx(expected, rel=1e-5)
    exact = take_step(chosen(group="global_batch"), 1)
    torch.testing.assert_close(outcome.gradient, exact.gradient, rtol=1e-5, atol=1e-8)
    after = take_step(chosen(group="global_batch_one_pass"), micro_steps, 4, outcome.statistics.loss_range)
    exact = take_step(chosen(group="global_batch"), 1, 4)
    torch.testing.assert_close(after.gradient, exact.gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("average", ["token", "sequence"])
def test_tokens_are_weighed_over_the_group(group: str, average: str) -> None:
    """Against the sum written out: (1 - p_t) of each token, scaled so that the group's weighted count is its count."""
    logits, batch = logits_of(1).double().requires_grad_(), batch_of(1, np.arange(GLOBAL_BATCH))
    losses = -logits.log_softmax(-1).gather(2, batch.labels[..., None])[..., 0]
    counts = batch.loss_mask.sum(1)
    each = torch.ones_like(losses) if average == "token" else 1 / counts.clamp(min=1)[:, None] + 0 * losses
    each = each * batch.loss_mask
    importances = (1 - (-losses).exp()).detach()
    objective = torch.zeros((), dtype=torch.float64)
    size = GLOBAL_BATCH // 4 if group == "micro_step" else GLOBAL_BATCH
    for rows in torch.arange(GLOBAL_BATCH).split(size):
        scale = each[rows].sum() / (each * importances)[rows].sum()
        objective = objective + scale * (each * importances * losses)[rows].sum() / each.sum()
    objective.backward()
    outcome = take_step(chosen(average, True, group=group), 4)
    assert logits.grad is not None
    torch.testing.assert_close(outcome.gradient, logits.grad.float(), rtol=1e-4, atol=1e-7)
    assert outcome.statistics.objective == pytest.approx(objective.item())


@pytest.mark.parametrize("group", GROUPS)
def test_a_token_without_a_loss_drops_its_sequence_alone(group: str) -> None:
    logits = logits_of(1)
    logits[5, 0, 3:9] = math.nan
    outcome = take_step(chosen(tokens=True, group=group), 4, logits=logits)
    assert outcome.gradient.isfinite().all()
    assert outcome.gradient[5].abs().max() == 0
    assert [found.position for found in outcome.statistics.dropped] == [GLOBAL_BATCH + 5]
    assert math.isfinite(outcome.statistics.objective)


def test_the_weight_of_a_sequence_is_shared_among_its_labels() -> None:
    losses = torch.tensor([[0.5, 2.0, 7.0], [1.0, 1.0, 1.0]])
    labelled = torch.tensor([[True, True, False], [False, False, False]])
    shares, means = token_weights(losses, labelled, Doubtful(of="token"), 1.0)
    first = torch.tensor([1 - math.exp(-0.5), 1 - math.exp(-2.0)])
    torch.testing.assert_close(shares[0], torch.tensor([*(first / first.mean()).tolist(), 0.0]))
    assert means[0].item() == pytest.approx(math.log(first.mean().item()))
    assert shares[1].tolist() == [0.0] * 3
