"""The Z-loss: golden values, invariance, bounds, what is measured beside it, dropped samples, refusals."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline import TokenSource
from data_pipeline.errors import UserError
from data_pipeline.settings import build_settings
from pretrain.distributed import Distributed
from pretrain.evaluation import Score, evaluate, evaluation_metrics
from pretrain.objective import ObjectiveSettings
from pretrain.objective.losses.spherical_z import SMALLEST_VARIANCE, SphericalZSettings

from .steps import GLOBAL_BATCH, LENGTH, VOCABULARY, batch_of, tiny_config
from .test_evaluation import Rows
from .test_sample_groups import GROUPS, logits_of, take_step

LOGITS = [1.0, 2.0, 0.0, -1.0, 3.0]
GOLDEN = [({"a": 0.1, "b": 10.0}, 12.118827), ({"a": 1.0, "b": 1.0}, 0.507335)]


def loss_of(logits: Tensor, label: int, **given: float) -> Tensor:
    """From the moments of the logits."""
    moments = torch.stack([logits[label], logits.mean(), logits.var(correction=0)])
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses = SphericalZSettings(**given).of_tokens(moments.view(1, 1, 3), torch.tensor([[label]]), mask)
    return losses.sum()


@pytest.mark.parametrize(("given", "golden"), GOLDEN)
def test_golden_values(given: dict[str, float], golden: float) -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    assert loss_of(logits, 4, **given).item() == pytest.approx(golden, abs=5.1e-7)
    assert loss_of(3 * logits + 7, 4, **given).item() == pytest.approx(golden, abs=5.1e-7)
    measured = SphericalZSettings(**given).measures()["loss"](logits.float().view(1, 1, 5), torch.tensor([[4]]))
    assert measured.item() == pytest.approx(golden, rel=1e-5)


@examples(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(-50, 50), st.floats(0.05, 3.0), st.floats(-5, 20))
def test_values_gradients_and_invariance(seed: int, scale: float, shift: float, a: float, b: float) -> None:
    """Against the definition in numpy; the gradient of s o + t is that of o over s; the gradients sum up to 0, and are
    orthogonal to o."""
    values = np.random.default_rng(seed).normal(size=9)
    z = (values[2] - values.mean()) / values.std()
    assert z <= math.sqrt(8) + 1e-12
    logits = torch.from_numpy(values).requires_grad_()
    moved = (scale * torch.from_numpy(values) + shift).requires_grad_()
    plain, other = loss_of(logits, 2, a=a, b=b), loss_of(moved, 2, a=a, b=b)
    assert plain.item() == pytest.approx(np.logaddexp(0, a * (b - z)) / a, rel=1e-12)
    assert other.item() == pytest.approx(plain.item(), rel=1e-9)
    (gradient,), (scaled,) = torch.autograd.grad(plain, logits), torch.autograd.grad(other, moved)
    torch.testing.assert_close(scaled * scale, gradient, rtol=1e-7, atol=1e-12)
    assert abs(gradient.sum().item()) < 1e-12
    assert abs((gradient @ logits).item()) < 1e-12


def test_the_gradient_by_z_is_between_minus_1_and_0() -> None:
    z = torch.tensor([-300.0, -3.0, 0.0, 3.0, 12.0], dtype=torch.float64, requires_grad=True)
    moments = torch.stack([z, torch.zeros(5), torch.ones(5)], -1).view(1, 5, 3)
    mask = torch.ones(1, 5, dtype=torch.bool)
    losses = SphericalZSettings(a=2.0, b=1.0).of_tokens(moments, torch.zeros(1, 5), mask)
    (slopes,) = torch.autograd.grad(losses.sum(), z)
    assert slopes.tolist() == pytest.approx([-1 / (1 + math.exp(-2 * (1 - each))) for each in z.tolist()])
    assert losses[0, 0].item() == pytest.approx(301), "no overflow"


def test_logits_without_variance_have_a_loss_and_a_gradient() -> None:
    """As those of a head that is 0: z is 0."""
    logits = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    loss = loss_of(logits, 1, a=1.0, b=1.0)
    assert loss.item() == pytest.approx(math.log1p(math.e))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert gradient[1].item() < 0
    assert SMALLEST_VARIANCE < 1e-8


def test_the_mask_takes_losses_and_gradients_away() -> None:
    moments = torch.randn(2, 3, 3).requires_grad_()
    mask = torch.tensor([[True, False, True], [False, False, False]])
    losses = SphericalZSettings().of_tokens(moments.abs(), torch.zeros(2, 3), mask)
    losses.sum().backward()
    assert ((losses != 0) == mask).all()
    assert moments.grad is not None
    assert ((moments.grad.abs().sum(-1) != 0) == mask).all()


def test_measures_of_ranks() -> None:
    """Ties count against the label; a logit that is not a number is first."""
    measures = SphericalZSettings().measures()
    logits = torch.tensor([[[3.0, 1, 2], [3, 3, 2], [0, 1, 2], [1, math.nan, 0]]])
    labels = torch.tensor([[0, 0, 0, 0]])
    assert measures["accuracy"](logits, labels).tolist() == [[1, 0, 0, 0]]
    assert measures["reciprocal_rank"](logits, labels).tolist() == [[1, 0.5, pytest.approx(1 / 3), 0.5]]


def test_an_evaluation_tells_no_likelihood() -> None:
    logits = logits_of(9)
    passes = iter(logits.split(2))
    alone = Distributed(0, 1, torch.device("cpu"))
    loss = SphericalZSettings(a=1.0, b=2.0)
    pieces = torch.ones(VOCABULARY, dtype=torch.long)
    source = cast(TokenSource, Rows())  # as much of one as an evaluation asks for
    scores = evaluate(lambda batch: next(passes), {"a": source}, pieces, 2, None, alone, loss)
    fields = evaluation_metrics(["a"], scores)
    batch = batch_of(9, np.arange(8))
    mask, values = batch.loss_mask.numpy(), logits.double().numpy()
    chosen = np.take_along_axis(values, batch.labels.numpy()[..., None], -1)[..., 0]
    z = (chosen - values.mean(-1)) / values.std(-1)
    ranks = (values >= chosen[..., None]).sum(-1)
    nats = np.log(np.exp(values).sum(-1)) - chosen
    expected = {
        "loss": np.log1p(np.exp(2 - z)),
        "accuracy": ranks == 1,
        "reciprocal_rank": 1 / ranks,
        "softmax_loss": nats,
    }
    for name, values in expected.items():
        assert fields[name] == pytest.approx(values[mask].mean(), rel=1e-5), name
        assert fields[f"domain_{name}/a"] == fields[name]
    assert "perplexity" not in fields
    assert "bits_per_byte" not in fields
    both = evaluation_metrics(["a", "b"], [scores[0], Score(0.0, 0, 0, 0, dict.fromkeys(loss.measures(), 0.0))])
    assert both["accuracy"] == fields["accuracy"]
    assert "domain_accuracy/b" not in both, "nothing of b is left"


def chosen(**given: Any) -> ObjectiveSettings:
    return build_settings(ObjectiveSettings, {"loss": {"kind": "spherical_z", "a": 0.5, "b": 3.0}, **given}, "test")


def moments_of(step: int) -> Tensor:
    """[rows, LENGTH, 3], as a model gives them."""
    logits = logits_of(step)
    return torch.stack([logits[..., 3], logits.mean(-1), logits.var(-1, correction=0)], -1)


@pytest.mark.parametrize("group", GROUPS)
def test_a_loss_that_is_not_finite_poisons_nothing(group: str) -> None:
    reweighting = {"strategy": "linupper", "temperature": 0.4, "group": group}
    moments = moments_of(1)
    moments[5, 0] = math.nan
    outcome = take_step(chosen(reweighting=reweighting), 4, logits=moments)
    assert outcome.gradient.isfinite().all()
    assert outcome.gradient[5].abs().max() == 0
    assert [found.position for found in outcome.statistics.dropped] == [GLOBAL_BATCH + 5]
    assert outcome.statistics.weights is not None
    assert outcome.gradient.shape[1:] == (LENGTH, 3)


def test_refusals() -> None:
    with pytest.raises(UserError, match="is of the log-partition over all logits"):
        chosen(z_loss=0.1)
    for strategy in ({"kind": "focal"}, {"kind": "self_adjusting", "alpha": 1}):
        with pytest.raises(UserError, match=f"strategy {strategy['kind']} weighs by p = exp"):
            chosen(reweighting={"strategy": strategy})
    chosen(reweighting={"strategy": {"kind": "focal", "gamma": 0}})
    for wrong, told in (({"a": 0.0}, "greater than 0"), ({"b": math.inf}, "finite"), ({"c": 1}, "loss.c")):
        with pytest.raises(UserError, match=told):
            chosen(loss={"kind": "spherical_z", **wrong})
    with pytest.raises(UserError, match="did you mean 'spherical_z'"):
        chosen(loss="sperical_z")
    base = {"hidden_size": 8, "heads": 2, "intermediate_size": 16}
    with pytest.raises(UserError, match="spherical_z is the same for logits times any constant, as muP"):
        tiny_config(objective={"loss": "spherical_z"}, model={"mup": {"base": base}})


def test_cross_entropy_is_the_default_to_the_bit() -> None:
    """Law 9."""
    plain, named = (
        take_step(build_settings(ObjectiveSettings, each, "test"), 4) for each in ({}, {"loss": "cross_entropy"})
    )
    assert torch.equal(plain.gradient, named.gradient)
    assert plain.statistics.objective == named.statistics.objective
