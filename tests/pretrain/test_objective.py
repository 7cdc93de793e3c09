"""The objective's parts against closed forms: cross-entropy, z-loss, the one denominator."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.objective import Term, engine_loss
from pretrain.objective.cross_entropy import sequence_cross_entropy, sequence_squared_log_partition


def test_cross_entropy_of_uniform_logits_is_log_of_the_vocabulary() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    sums = sequence_cross_entropy(torch.zeros(2, 3, 7), torch.randint(0, 7, (2, 3)), mask)
    assert sums.dtype == torch.float32
    assert sums.tolist() == pytest.approx([2 * math.log(7), 0.0])


def test_cross_entropy_has_no_gradient_where_the_mask_is_off() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    sequence_cross_entropy(
        logits, torch.ones(1, 3, dtype=torch.long), torch.tensor([[True, False, True]])
    ).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().max() == 0
    assert logits.grad[0, 0].abs().max() > 0


def test_squared_log_partition_of_zero_logits() -> None:
    """Zero logits, 8 classes: (ln 8)^2 = 4.324077 a token."""
    mask = torch.tensor([[True, True, False]])
    assert sequence_squared_log_partition(torch.zeros(1, 3, 8), mask).item() == pytest.approx(2 * 4.324077)


def test_the_log_partition_of_a_token_without_label_does_not_count_whatever_it_is() -> None:
    """A product with the mask would make NaN of it, and stop a run whose counted losses are all finite."""
    logits = torch.zeros(1, 3, 8)
    logits[0, 2, 1:3] = torch.tensor([math.nan, math.inf])
    mask = torch.tensor([[True, True, False]])
    assert sequence_squared_log_partition(logits, mask).item() == pytest.approx(2 * 4.324077)


def test_engine_loss_makes_a_sum_over_ranks_out_of_a_mean() -> None:
    """Two ranks holding numerators 3 and 5 over the denominator 4: the mean of what they hand over is 8 / 4."""
    handed = [engine_loss([Term(torch.tensor(value), 4.0)], world_size=2) for value in (3.0, 5.0)]
    assert torch.stack(handed).mean().item() == pytest.approx(2.0)


def test_engine_loss_adds_terms_with_their_coefficients() -> None:
    terms = [Term(torch.tensor(6.0), 3.0), Term(torch.tensor(8.0), 4.0, coefficient=0.5)]
    assert engine_loss(terms, world_size=1).item() == pytest.approx(3.0)


def test_engine_loss_of_a_step_without_labels_is_zero_and_keeps_the_graph() -> None:
    numerator = torch.zeros((), requires_grad=True)
    loss = engine_loss([Term(numerator * 2, 0.0)], world_size=4)
    loss.backward()
    assert loss.item() == 0
    assert numerator.grad is not None
    assert numerator.grad.item() == 0
