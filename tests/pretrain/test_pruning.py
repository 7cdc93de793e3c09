"""Which weights magnitude pruning keeps, against a plain sort."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pretrain.model.pruning import kept_count, keys, largest, sparsity_at


def by_sorting(weights: list[Tensor], masks: list[Tensor], keep: int) -> list[list[bool]]:
    """What is kept: the largest magnitudes, of equal ones the earlier; never what a mask leaves out."""
    entries = [
        (-abs(float(value)), layer, place)
        for layer, (weight, mask) in enumerate(zip(weights, masks, strict=True))
        for place, (value, here) in enumerate(zip(weight.flatten(), mask.flatten(), strict=True))
        if here
    ]
    kept = {(layer, place) for _, layer, place in sorted(entries)[:keep]}
    return [[(layer, place) in kept for place in range(weight.numel())] for layer, weight in enumerate(weights)]


def found(weights: list[Tensor], masks: list[Tensor], keep: int) -> list[list[bool]]:
    names = [str(layer) for layer in range(len(weights))]
    made = dict(largest(names, lambda name: keys(weights[int(name)], masks[int(name)]), keep))
    assert list(made) == names
    assert [each.shape for each in made.values()] == [each.shape for each in weights]
    return [each.flatten().tolist() for each in made.values()]


@given(st.data())
def test_the_largest_are_kept_whatever_the_values(data: st.DataObject) -> None:
    value = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-140]), st.floats(width=32, allow_nan=False))
    layers = data.draw(
        st.lists(st.lists(st.tuples(value, st.booleans()), min_size=1, max_size=8), min_size=1, max_size=3)
    )
    weights = [torch.tensor([v for v, _ in layer], dtype=torch.float32) for layer in layers]
    masks = [torch.tensor([here for _, here in layer]) for layer in layers]
    keep = data.draw(st.integers(1, sum(map(len, layers))))
    assert found(weights, masks, keep) == by_sorting(weights, masks, keep)


@pytest.mark.parametrize("decimals", [1, 8])
def test_matrices_with_and_without_ties(decimals: int) -> None:
    random = np.random.default_rng(decimals)
    weights = [torch.from_numpy(random.normal(size=shape).round(decimals)).float() for shape in ((13, 7), (5, 40))]
    masks = [torch.from_numpy(random.random(each.shape) < 0.7) for each in weights]
    remaining = sum(int(each.sum()) for each in masks)
    for keep in (1, 17, remaining - 1, remaining, remaining + 5):
        assert found(weights, masks, keep) == by_sorting(weights, masks, keep)
        assert sum(map(sum, found(weights, masks, keep))) == min(keep, remaining)


def test_the_cubic_schedule() -> None:
    """1 - (1 - (t - t0) / (n Δt))³ of the way; 7/8 of it at half time."""
    at = [sparsity_at(step, 10, 30, 0.0, 0.8) for step in (10, 15, 20, 30)]
    assert at == [0, Fraction(8, 10) * (1 - Fraction(27, 64)), Fraction(7, 10), Fraction(8, 10)]
    assert sparsity_at(20, 10, 30, 0.4, 0.8) == Fraction(8, 10) - Fraction(4, 10) / 8


def test_a_fraction_of_a_weight_is_not_pruned() -> None:
    assert [kept_count(10, Fraction(s)) for s in ("0", "0.29", "0.3", "0.95")] == [10, 8, 7, 1]
    assert kept_count(1000, sparsity_at(30, 10, 30, 0.0, 0.7)) == 300  # which 1000 * (1 - 0.7) in floats is not
