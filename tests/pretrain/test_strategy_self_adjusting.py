"""Self-adjusting Dice weights: the loss written out and differentiated, its limits, off, refusals."""

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

PROBABILITIES = [0.01, 0.2, 0.5, 0.9, 0.999]
LOSSES = torch.tensor([-math.log(p) for p in PROBABILITIES], dtype=torch.float64)


def chosen(**given: Any) -> dict[str, Any]:
    return {"strategy": {"kind": "self_adjusting", **given}}


def importances(losses: Tensor, **given: Any) -> Tensor:
    strategy = build_settings(ReweightingSettings, chosen(**given), "test").strategy
    return strategy.log_importances(losses, losses.min(), losses.max(), 1.0).exp()


def dice(losses: Tensor, alpha: float, smooth: float, detached: bool = True) -> Tensor:
    """The paper's DSC of positive samples, y = 1, each by itself."""
    p = (-losses).exp()
    weight = (1 - p) ** alpha
    weight = weight.detach() if detached else weight
    return 1 - (2 * weight * p * 1 + smooth) / (weight * p + 1 + smooth)


@pytest.mark.parametrize("smooth", [1e-4, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_an_instance_weighs_as_the_dice_loss_is_differentiated(alpha: float, smooth: float) -> None:
    losses = LOSSES.clone().requires_grad_()
    dice(losses, alpha, smooth).sum().backward()
    assert losses.grad is not None
    torch.testing.assert_close(importances(LOSSES, alpha=alpha, smooth=smooth), losses.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_set_weighs_as_the_dice_loss_of_its_sums(alpha: float) -> None:
    """The authors' binary form: sums over the batch, all of them positive; normalised, as weights are."""
    losses = LOSSES.clone().requires_grad_()
    p = (-losses).exp()
    u = (1 - p).detach() ** alpha * p
    (1 - (2 * u.sum() + 1e-4) / (u.sum() + len(u) + 1e-4)).backward()
    assert losses.grad is not None
    plain = losses.grad / losses.grad.mean()
    found = weights(LOSSES, **chosen(alpha=alpha, form="set"))
    torch.testing.assert_close(found, plain.float(), rtol=1e-6, atol=0)


def test_golden_values() -> None:
    """Soft Dice at p = 1/2 and without smoothing: 1/2 * 2 / (3/2)^2 = 4/9; with alpha 1: u = 1/4, 1/4 * 2 / (5/4)^2."""
    half = torch.tensor([math.log(2.0)], dtype=torch.float64)
    assert importances(half, alpha=0, smooth=0).item() == pytest.approx(4 / 9)
    assert importances(half, alpha=1, smooth=0).item() == pytest.approx(0.32)
    assert importances(half, alpha=3, form="weight").item() == pytest.approx(1 / 8)
    # losses ln 2 and ln 4: u = 1/4 and 3/16
    assert weights([math.log(2), math.log(4)], **chosen(alpha=1, form="set")).tolist() == pytest.approx([8 / 7, 6 / 7])


def test_the_losses_behind_the_weights() -> None:
    """Golden values: perfect and alpha 0 is 0; with alpha a confident positive costs 1 / (1 + smooth), and
    differentiated through its weight the loss is least at p = 1/2, which is why it is detached."""
    sure = torch.tensor([0.0], dtype=torch.float64)
    assert dice(sure, 0.0, 1e-4).item() == pytest.approx(0.0)
    assert dice(sure, 1.0, 1e-4).item() == pytest.approx(1 / (1 + 1e-4))
    losses = torch.tensor([math.log(2)], dtype=torch.float64, requires_grad=True)
    dice(losses, 1.0, 1e-4, detached=False).backward()
    assert losses.grad is not None
    assert losses.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("form", ["instance", "set", "weight"])
def test_limits(form: str) -> None:
    """A certain sample weighs nothing beside others, and no loss makes a weight that is not a number."""
    found = weights([0.0, -1e-9, 1.0], **chosen(alpha=1.0, form=form))
    assert found.tolist() == pytest.approx([0, 0, 3], abs=1e-6)
    assert weights([0.0] * 2, **chosen(alpha=1.0, form=form)).tolist() == [1.0] * 2
    assert weights([700.0, 1e6, 1e30], **chosen(alpha=1.0, form=form)).isfinite().all()


def test_the_weight_alone_is_focal() -> None:
    given = {"alpha": 0.7, "form": "weight"}
    focal = weights(LOSSES, strategy={"kind": "focal", "gamma": 0.7})
    assert weights(LOSSES, **chosen(**given)).tolist() == focal.tolist()


@pytest.mark.parametrize("of", ["sequence", "token"])
@pytest.mark.parametrize("group", GROUPS)
def test_alpha_0_of_the_weight_is_uniform_to_the_bit(group: str, of: str) -> None:
    """Law 9."""
    reweighting = {**chosen(alpha=0, form="weight", of=of), "group": group}
    off = take_step(build_settings(ObjectiveSettings, {"reweighting": reweighting}, "test"), 4)
    uniform = take_step(build_settings(ObjectiveSettings, {}, "test"), 4)
    assert torch.equal(off.gradient, uniform.gradient)
    assert off.statistics.objective == uniform.statistics.objective
    assert off.statistics.weights is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (chosen(), "'strategy.alpha' is missing"),
        (chosen(alpha=-1), "greater than or equal to 0"),
        (chosen(alpha=1, form="batch"), "'strategy.form' = 'batch'"),
        (chosen(alpha=1, form="set", smooth=1.0), "smooth 1.0 has no meaning with form set"),
        ({**chosen(alpha=1), "temperature": 0.4}, "temperature has no meaning with strategy self_adjusting"),
    ],
)
def test_refusals(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        build_settings(ReweightingSettings, given, "test")
