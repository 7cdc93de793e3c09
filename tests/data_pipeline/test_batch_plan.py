"""Steps over positions: the plan against one that counts position by position."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.batch_plan import BatchPlan
from data_pipeline.errors import UserError
from data_pipeline.permutation import LARGEST

HORIZON = 200
"""Positions that a counting test walks over."""


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    """Small plans: ramps up and down, ranges that begin at 0, touch one another or hold one position."""
    ramp = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=3))
    gaps = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=4))
    ranges, at = [], 0
    for kept, skipped in gaps:
        ranges.append((at + kept, at + kept + skipped))
        at += kept + skipped
    return BatchPlan(draw(st.integers(1, 12)), tuple(ramp), tuple(ranges))


def counted_steps(plan: BatchPlan) -> Iterator[tuple[int, list[int]]]:
    """(start, positions) of every step, walking over single positions."""
    batches = itertools.chain(
        itertools.chain.from_iterable([batch] * steps for steps, batch in plan.ramp),
        itertools.repeat(plan.global_batch),
    )
    position = 0
    for batch in batches:
        start, taken = position, []
        while len(taken) < batch:
            if not any(first <= position < stop for first, stop in plan.skip_ranges):
                taken.append(position)
            position += 1
        yield start, taken


@settings(max_examples=150, deadline=None)
@given(plan=plans())
@example(plan=BatchPlan(4, ((2, 1), (1, 8)), ((0, 3), (3, 5), (9, 10))))
def test_the_plan_is_the_one_that_counts_positions(plan: BatchPlan) -> None:
    position = 0
    for step, (start, taken) in enumerate(counted_steps(plan)):
        if start > HORIZON:
            break
        assert plan.start_of(step) == start == position
        assert plan.batch(step) == len(taken)
        assert plan.positions(position, plan.batch(step)).tolist() == taken
        following = plan.after(position, plan.batch(step))
        assert following == taken[-1] + 1
        assert {plan.step_of(inside) for inside in range(position, following)} == {step}
        position = following


@settings(max_examples=100, deadline=None)
@given(plan=plans(), position=st.integers(0, HORIZON), batch=st.integers(1, 30))
def test_a_step_may_begin_anywhere_also_inside_a_skipped_range(plan: BatchPlan, position: int, batch: int) -> None:
    kept = [p for p in range(3 * HORIZON) if not any(start <= p < stop for start, stop in plan.skip_ranges)]
    assert plan.sequences_before(position) == sum(p < position for p in kept)
    expected = [p for p in kept if p >= position][:batch]
    assert plan.positions(position, batch).tolist() == expected
    assert plan.after(position, batch) == expected[-1] + 1


def test_a_ramp_and_a_skipped_range_in_figures() -> None:
    plan = BatchPlan(1024, ((10, 256), (5, 512)), ((3000, 3600),))
    assert [plan.batch(step) for step in (0, 9, 10, 14, 15, 10**9)] == [256, 256, 512, 512, 1024, 1024]
    assert [plan.start_of(step) for step in (0, 1, 10, 11, 12, 15, 16)] == [0, 256, 2560, 3672, 4184, 5720, 6744]
    assert plan.positions(2560, 512)[[0, 439, 440, 511]].tolist() == [2560, 2999, 3600, 3671]
    assert [plan.step_of(position) for position in (2559, 2560, 3300, 3671, 3672)] == [9, 10, 10, 10, 11]
    assert plan.sequences_before(3300) == 3000


def test_far_positions_are_exact_and_as_quick_as_near_ones() -> None:
    ranges = tuple((10**15 + 1000 * k, 10**15 + 1000 * k + 7) for k in range(2000))
    plan = BatchPlan(4096, tuple((3, 8 * (k + 1)) for k in range(500)), ranges)
    before = sum(steps * batch for steps, batch in plan.ramp)
    step = 1500 + 10**13
    assert plan.start_of(step) == before + 4096 * 10**13 + 7 * 2000
    began = time.perf_counter()
    for k in range(1000):
        assert plan.step_of(plan.start_of(step + k)) == step + k
    assert (time.perf_counter() - began) / 1000 < 1e-3, "measured at 3 us"
    taken = plan.positions(10**15 - 1, 2000)
    assert taken.dtype == np.int64
    assert taken[[0, 1, 994, 1999]].tolist() == [10**15 - 1, 10**15 + 7, 10**15 + 1007, 10**15 + 2019]
    assert BatchPlan(4, (), ((8, LARGEST),)).start_of(3) == LARGEST + 4


def test_identity_is_json() -> None:
    plan = BatchPlan(8, ((2, 4),), ((5, 9),))
    assert json.loads(json.dumps(plan.identity())) == plan.identity()
    assert plan.identity() == {"global_batch": 8, "ramp": [[2, 4]], "skip_ranges": [[5, 9]]}
    assert plan == BatchPlan(8, ((2, 4),), ((5, 9),))


@pytest.mark.parametrize(
    ("global_batch", "ramp", "skip_ranges", "message"),
    [
        (0, (), (), "a global batch of 0 sequences trains on nothing. Give 1 or more."),
        (8, ((0, 4),), (), "the batch ramp holds 0 steps of 4 sequences. Each of its pairs"),
        (8, ((2, 4), (5, 0)), (), "the batch ramp holds 5 steps of 0 sequences. Each of its pairs"),
        (8, (), ((5, 5),), "the skipped range (5, 5) holds no positions. Give (start, stop) with 0 <= start < stop"),
        (8, (), ((-1, 5),), "the skipped range (-1, 5) holds no positions"),
        (8, (), ((5, LARGEST + 1),), "holds no positions. Give (start, stop) with 0 <= start < stop <= 2^62"),
        (
            8,
            (),
            ((5, 9), (8, 12)),
            "the skipped range (8, 12) begins before the one in front of it ends, at 9. Give the ranges in ascending",
        ),
        (8, (), ((50, 90), (5, 9)), "the skipped range (5, 9) begins before the one in front of it ends, at 90"),
    ],
)
def test_a_plan_that_makes_no_steps_is_refused(
    global_batch: int, ramp: tuple[tuple[int, int], ...], skip_ranges: tuple[tuple[int, int], ...], message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        BatchPlan(global_batch, ramp, skip_ranges)
    assert message in str(refusal.value)


def test_a_run_whose_batch_was_changed_goes_on_from_where_it_stands() -> None:
    plan = BatchPlan(8, ((5, 4),), ((300, 310),))
    positions, step = [256], 4  # four steps of 64 under another plan
    while step < 12:
        positions.append(plan.after(positions[-1], plan.batch(step)))
        step += 1
    assert [plan.advance(4, 256, to_step) for to_step in range(4, 13)] == positions
    assert positions[-1] == 256 + 4 + 7 * 8 + 10
    assert plan.advance(4, 256, 3) == 256, "an end that lies behind is where the run stands"
