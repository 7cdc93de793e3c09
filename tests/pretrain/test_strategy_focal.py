"""Focal weights: closed forms, the derivative against autograd, limits, the exact off switch, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.objective import ObjectiveSettings, ReweightingSettings

from .test_reweighting import weights
from .test_sample_groups import GROUPS, take_step

PROBABILITIES = [0.1, 0.5, 0.9, 0.999]
LOSSES = [-math.log(p) for p in PROBABILITIES]


def focal(**given: Any) -> dict[str, Any]:
    return {"strategy": {"kind": "focal", **given}}


def importances(losses: Tensor, **given: Any) -> Tensor:
    strategy = build_settings(ReweightingSettings, focal(**given), "test").strategy
    return strategy.log_importances(losses, losses.min(), losses.max(), 1.0).exp()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_importance_is_one_minus_p_to_the_gamma(gamma: float) -> None:
    plain = [(1 - p) ** gamma for p in PROBABILITIES]
    assert importances(torch.tensor(LOSSES).double(), gamma=gamma).tolist() == pytest.approx(plain)
    relative = [4 * each / sum(plain) for each in plain]
    assert weights(LOSSES, **focal(gamma=gamma)).tolist() == pytest.approx(relative)


def test_golden_weights() -> None:
    """KaLM's gamma 0.5: square roots of 0.9, 0.5, 0.1 and 0.001, over a quarter of their sum."""
    # 0.948683 + 0.707107 + 0.316228 + 0.031623 = 2.003641
    golden = [4 * root / 2.003641 for root in (0.948683, 0.707107, 0.316228, 0.031623)]
    assert weights(LOSSES, strategy="focal").tolist() == pytest.approx(golden, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_differentiated_importance_is_the_derivative_of_the_focal_loss(gamma: float) -> None:
    losses = torch.tensor([1e-9, *LOSSES, 12.0], dtype=torch.float64, requires_grad=True)
    ((-(-losses).expm1()) ** gamma * losses).sum().backward()
    assert losses.grad is not None
    found = importances(losses.detach(), gamma=gamma, differentiate=True)
    torch.testing.assert_close(found, losses.grad, rtol=1e-7, atol=1e-12)


def test_the_gradient_of_a_detached_weight_is_the_weight_times_the_losses_gradient() -> None:
    """At every row of a step of one micro-step: u_i c_i / Σ c times the gradient of l_i, u by the definition."""
    plain = take_step(build_settings(ObjectiveSettings, {}, "test"), 1)
    outcome = take_step(build_settings(ObjectiveSettings, {"reweighting": focal(gamma=2.0)}, "test"), 1)
    assert math.isinf(outcome.statistics.temperature), "no r that could be shown"
    assert outcome.statistics.weights is not None
    samples = outcome.statistics.weights.samples
    losses, counts = samples.losses[0], samples.counts[0]
    plain_importances = (1 - (-losses).exp()) ** 2 * (counts > 0)
    u = plain_importances * counts.sum() / (plain_importances * counts).sum()
    torch.testing.assert_close(outcome.gradient, plain.gradient * u[:, None, None].float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_limits(gamma: float, differentiate: bool) -> None:
    """p to 1: weight 0; losses of 0, or just below by rounding, in a group with others and alone; p to 0: 1."""
    chosen = focal(gamma=gamma, differentiate=differentiate)
    found = weights([0.0, -1e-9, 1e-12, 5.0], **chosen)
    assert found[:3].tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert found[3].item() == pytest.approx(4.0, abs=1e-5)
    assert weights([0.0] * 3, **chosen).tolist() == [1.0] * 3
    assert weights([800.0, 1e6, 3e38], **chosen).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("of", ["sequence", "token"])
@pytest.mark.parametrize("group", GROUPS)
def test_gamma_0_is_uniform_to_the_bit(group: str, of: str) -> None:
    """Law 9."""
    chosen = build_settings(ObjectiveSettings, {"reweighting": {**focal(gamma=0, of=of), "group": group}}, "test")
    off, uniform = (take_step(each, 4) for each in (chosen, build_settings(ObjectiveSettings, {}, "test")))
    assert torch.equal(off.gradient, uniform.gradient)
    assert off.statistics.objective == uniform.statistics.objective
    assert off.statistics.weights is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (focal(gamma=-1), "greater than or equal to 0"),
        (focal(gamma=math.nan), "finite"),
        ({**focal(), "temperature": 0.4}, "temperature has no meaning with strategy focal"),
        (focal(of="word"), "'strategy.of' = 'word'"),
        (focal(alpha=1), "strategy.alpha"),
    ],
)
def test_refusals(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        build_settings(ReweightingSettings, given, "test")
