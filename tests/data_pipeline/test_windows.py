"""Strata and windows against a partition cut by hand with Python's integers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.permutation import LARGEST
from data_pipeline.windows import SMALLEST_STRATUM, Windows


@settings(max_examples=60, deadline=None)
@given(strata=st.integers(1, 40), window=st.integers(1, 200), more=st.integers(0, 1000))
def test_strata_and_windows_cut_a_source_into_neighbours(strata: int, window: int, more: int) -> None:
    sequences = strata * SMALLEST_STRATUM + more
    windows, every = Windows(strata, window), np.arange(sequences)
    number = windows.stratum_of(sequences, every)
    bounds = [i * sequences // strata for i in range(strata + 1)]
    assert number.tolist() == [i for i in range(strata) for _ in range(bounds[i], bounds[i + 1])]
    cut = windows.strata_at(sequences, number)
    at = windows.window_at(cut, every - cut.first)
    first, stop = cut.first + at.begin, cut.first + at.begin + at.length
    assert cut.first.tolist() == [bounds[i] for i in number]
    assert cut.size.tolist() == [bounds[i + 1] - bounds[i] for i in number]
    assert ((first <= every) & (every < stop)).all()
    assert ((cut.first <= first) & (stop <= cut.first + cut.size)).all()
    # neighbours lie in one window, or one ends where the next begins
    same = first[1:] == first[:-1]
    assert (same | (first[1:] == stop[:-1])).all()
    whole = (stop - first == window) & (first >= cut.first + cut.head)
    assert (whole == at.is_whole).all()
    lengths = np.unique(np.stack([number, first, stop - first])[:, stop - first < window], axis=1)
    assert (np.bincount(lengths[0], minlength=strata) <= 2).all(), "but for a head and a tail, windows are whole"


def test_strata_of_the_largest_source_are_exact() -> None:
    for sequences in (LARGEST, LARGEST - 1, 2_440_000_007, (1 << 53) + 1):
        windows = Windows(65_535, 1000)
        bounds = [i * sequences // 65_535 for i in (0, 1, 2, 30_000, 65_533, 65_534, 65_535)]
        edges = np.array([*bounds[:-1], *(bound - 1 for bound in bounds[1:])])
        strata = windows.stratum_of(sequences, edges)
        assert strata.tolist() == [0, 1, 2, 30_000, 65_533, 65_534, 0, 1, 29_999, 65_532, 65_533, 65_534]
        assert windows.strata_at(sequences, strata[:6]).first.tolist() == bounds[:-1]
        assert strata.dtype == np.int64


def test_slots_do_not_change_windows_all_at_once() -> None:
    heads = Windows(1024, 512).strata_at(10**9, np.arange(1024)).head
    assert np.bincount(heads // 64, minlength=8).min() > 90
    assert Windows(1024, 512).cuts(np.array([65_535, 65_536])).tolist() == [False, True]


@pytest.mark.parametrize(
    ("strata", "sequences", "message"),
    [
        (0, 5, "can't have 0 strata. Give 1 to 65536; best the global batch"),
        (65_537, 5, "can't have 65537 strata"),
        (4, 0, "a window can't hold 0 sequences. Give 1 or more"),
    ],
)
def test_windows_out_of_bounds_are_refused(strata: int, sequences: int, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        Windows(strata, sequences)
    assert message in str(refusal.value)
