"""The objective's parts against closed forms: cross-entropy, z-loss, weights, the one denominator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.objective import ReweightingSettings, Term, engine_loss
from pretrain.objective.cross_entropy import sequence_cross_entropy, sequence_squared_log_partition
from pretrain.objective.reweighting import relative_weights

LOSSES = torch.tensor([2.0, 3.0, 4.0, 6.0])


def linupper(temperature: float) -> ReweightingSettings:
    return ReweightingSettings(strategy="linupper", temperature=temperature)


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


@pytest.mark.parametrize(
    ("temperature", "golden"),
    [
        (0.4, [0.034656, 0.120960, 0.422192, 0.422192]),
        (1.0, [0.123681, 0.203916, 0.336201, 0.336201]),
        (100.0, [0.248440, 0.249686, 0.250937, 0.250937]),
    ],
)
def test_linupper_golden_values(temperature: float, golden: list[float]) -> None:
    """arXiv 2502.06733: with equal counts the relative weights are the paper's times the group size."""
    weights = relative_weights(LOSSES, torch.full((4,), 5), linupper(temperature))
    assert (weights / 4).tolist() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("settings", [ReweightingSettings(), linupper(math.inf)])
def test_off_is_exactly_uniform(settings: ReweightingSettings) -> None:
    """Law 9: no strategy, and an infinite temperature, are bitwise the same."""
    assert relative_weights(LOSSES, torch.tensor([3, 1, 9, 2]), settings).tolist() == [1.0] * 4


def test_samples_without_labels_stay_out_of_the_loss_range() -> None:
    with_hole = relative_weights(torch.tensor([0.0, 2.0, 3.0, 4.0, 6.0]), torch.tensor([0, 5, 5, 5, 5]), linupper(0.4))
    assert with_hole[0] == 0
    assert with_hole[1:].tolist() == relative_weights(LOSSES, torch.full((4,), 5), linupper(0.4)).tolist()


def test_a_group_without_any_label_weighs_nothing() -> None:
    assert relative_weights(torch.zeros(3), torch.zeros(3, dtype=torch.long), linupper(1.0)).tolist() == [0.0] * 3


finite_losses = st.lists(st.floats(0.0, 20.0, width=32), min_size=2, max_size=16)


@given(finite_losses, st.floats(0.1, 10.0), st.floats(0.5, 3.0), st.floats(0.0, 5.0))
def test_invariants(values: list[float], temperature: float, scale: float, shift: float) -> None:
    """The weighted count is the plain count; weights are positive, equivariant and blind to scale and shift."""
    losses = torch.tensor(values, dtype=torch.float64)
    counts = torch.arange(1, len(values) + 1)
    settings = linupper(temperature)
    weights = relative_weights(losses, counts, settings)
    assert (weights.double() * counts).sum().item() == pytest.approx(counts.sum().item(), rel=1e-5)
    assert (weights > 0).all()
    order = torch.randperm(len(values))
    assert relative_weights(losses[order], counts[order], settings).tolist() == pytest.approx(weights[order].tolist())
    if losses.max() - losses.min() > 1e-2:
        moved = relative_weights(losses * scale + shift, counts, settings)
        assert moved.tolist() == pytest.approx(weights.tolist(), rel=1e-4)
        middle = (losses.max() + losses.min()) / 2
        assert set(weights[losses >= middle].tolist()) == {weights.max().item()}


def test_equal_losses_weigh_equally() -> None:
    assert relative_weights(torch.full((5,), 3.7), torch.full((5,), 4), linupper(0.1)).tolist() == pytest.approx(
        [1.0] * 5
    )


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
