"""Moments of the logits against the logits themselves: values, gradients, what is shared, what is never made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pretrain.model.linear.head as head
from pretrain.model.linear.head import RowStatistics, logit_moments

from .test_linear_costs import Largest

V, D, TOKENS = 61, 7, (3, 11)


def made(seed: int, vocabulary: int = V, width: int = D, shape: tuple[int, ...] = TOKENS) -> tuple[Tensor, ...]:
    """Weight whose rows have a mean, features, labels that repeat, and a gradient by the moments."""
    torch.manual_seed(seed)
    weight = torch.randn(vocabulary, width, dtype=torch.float64) + torch.randn(width)
    features = torch.randn(*shape, width, dtype=torch.float64)
    gradient = torch.randn(*shape, 3, dtype=torch.float64)
    return weight.requires_grad_(), features.requires_grad_(), torch.randint(0, vocabulary // 3, shape), gradient


def plain_moments(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """By all logits."""
    logits = x @ weight.T
    chosen = logits.gather(-1, labels[..., None])[..., 0]
    return torch.stack([chosen, logits.mean(-1), logits.var(-1, correction=0)], -1)


@pytest.mark.parametrize("rows", [head.ROWS, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_and_gradients_are_those_of_all_logits(seed: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ROWS", rows)
    weight, x, labels, gradient = made(seed)
    found, plain = logit_moments(x, weight, labels), plain_moments(x, weight, labels)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each, (x, weight), gradient) for each in (found, plain))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


def test_logits_far_from_zero_cost_no_digits() -> None:
    """The covariance is of centred rows: mean square less squared mean would leave nothing of the variance in fp32."""
    weight, x, labels, _ = made(3)
    low = weight.detach().float() + 300.0
    exact = plain_moments(x.detach(), low.double(), labels)
    found = logit_moments(x.detach().float(), low, labels)
    torch.testing.assert_close(found[..., 2].double(), exact[..., 2], rtol=1e-3, atol=0)


def test_low_precision_is_computed_in_fp32() -> None:
    weight, x, labels, gradient = made(4)
    low_weight, low_x = (each.detach().bfloat16().requires_grad_() for each in (weight, x))
    found = logit_moments(low_x, low_weight, labels)
    exact = plain_moments(low_x.float(), low_weight.float(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    by_x, by_weight = torch.autograd.grad(found, (low_x, low_weight), gradient.float())
    assert (by_x.dtype, by_weight.dtype) == (torch.bfloat16, torch.bfloat16)
    plain = torch.autograd.grad(exact, (low_x, low_weight), gradient.float())
    torch.testing.assert_close((by_x, by_weight), plain, rtol=2**-7, atol=1e-3)


def test_one_optimizer_step_shares_statistics_and_the_dense_gradient() -> None:
    """Three micro-steps: before the last only rows of labels have a gradient; together they have the whole."""
    weight, x, labels, gradient = made(5, shape=(3, 11))
    whole = torch.autograd.grad(plain_moments(x, weight, labels), (x, weight), gradient)
    shared, parts = RowStatistics(), []
    for _ in range(2):  # optimizer steps
        shared.begin(last=False)
        parts = []
        for number in range(3):
            shared.last = number == 2
            moments = logit_moments(x[number], weight, labels[number], shared)
            by_x, by_weight = torch.autograd.grad(moments, (x, weight), gradient[number])
            torch.testing.assert_close(by_x[number], whole[0][number], rtol=1e-10, atol=1e-10)
            parts.append(by_weight)
        touched = [set(part.abs().sum(1).nonzero()[:, 0].tolist()) for part in parts]
        assert [len(rows) < V for rows in touched] == [True, True, False]
        assert touched[0] == set(labels[0].tolist())
        torch.testing.assert_close(parts[0] + parts[1] + parts[2], whole[1], rtol=1e-10, atol=1e-10)


def test_statistics_hold_until_the_next_step_begins() -> None:
    weight, x, labels, _ = made(6)
    shared = RowStatistics()
    with torch.no_grad():
        before = logit_moments(x, weight, labels, shared)
        weight *= 2.0
        assert torch.equal(logit_moments(x, weight, labels, shared)[..., 1:], before[..., 1:])
        shared.begin()
        torch.testing.assert_close(logit_moments(x, weight, labels, shared)[..., 2], 4 * before[..., 2])


def test_no_tensor_of_tokens_and_vocabulary_is_made() -> None:
    weight, x, labels, gradient = made(7, vocabulary=3000, width=8, shape=(1, 500))
    with Largest() as largest:
        torch.autograd.grad(logit_moments(x, weight, labels), (x, weight), gradient)
    assert largest.size == 3000 * 8
    with Largest() as largest:
        plain_moments(x, weight, labels)
    assert largest.size == 3000 * 500
