"""Which positions each optimizer step takes: the batch-size ramp and the ranges of positions that are left out.

The order says what a position holds; the plan only cuts the line of positions into steps. A step at position p with
batch B takes the next B positions at or after p that lie in no skipped range, and the next step begins right after
the last one taken. So a longer ramp or a range left out after a loss spike moves the borders of steps, never a sample
from its position, and (step, position) is all that a resume needs.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UserError
from .permutation import LARGEST, IntArray


@dataclass(frozen=True)
class BatchPlan:
    """Cuts positions into steps. ``start_of`` and ``step_of`` count from step 0 at position 0, in O(log) time.

    Args:
        global_batch: sequences per step once the ramp is over.
        ramp: ``(steps, batch)`` pairs: the run's first ``steps`` steps take ``batch`` sequences each, then the next
            pair counts.
        skip_ranges: ``(start, stop)`` pairs of positions ``[start, stop)`` that no step takes, in ascending order.

    Raises:
        UserError: a batch or a number of steps below 1, or ranges that are empty, out of order or overlap.
    """

    global_batch: int
    ramp: tuple[tuple[int, int], ...] = ()
    skip_ranges: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise UserError(f"a global batch of {self.global_batch} sequences trains on nothing. Give 1 or more.")
        for steps, batch in self.ramp:
            if steps < 1 or batch < 1:
                raise UserError(
                    f"the batch ramp holds {steps} steps of {batch} sequences. Each of its pairs (steps, batch) needs "
                    "at least one step of at least one sequence."
                )
        before = 0
        for start, stop in self.skip_ranges:
            if not 0 <= start < stop <= LARGEST:
                raise UserError(
                    f"the skipped range ({start}, {stop}) holds no positions. Give (start, stop) with "
                    f"0 <= start < stop <= 2^62: the positions from start up to, but without, stop are left out."
                )
            if start < before:
                raise UserError(
                    f"the skipped range ({start}, {stop}) begins before the one in front of it ends, at {before}. "
                    "Give the ranges in ascending order and merge those that overlap."
                )
            before = stop

    def batch(self, step: int) -> int:
        """How many sequences step ``step`` of the run takes."""
        stage = bisect.bisect_right(self._stage_steps, step) - 1
        return self.ramp[stage][1] if stage < len(self.ramp) else self.global_batch

    def positions(self, position: int, batch: int) -> IntArray:
        """What a step of ``batch`` sequences that begins at ``position`` takes: ascending positions, int64 [batch]."""
        kept = self.sequences_before(position) + np.arange(batch, dtype=np.int64)
        if not self.skip_ranges:
            return kept
        passed = np.searchsorted(np.array(self._kept_before, np.int64), kept, side="right")
        return kept + np.array(self._skipped, np.int64)[passed]

    def after(self, position: int, batch: int) -> int:
        """Where the step after one of ``batch`` sequences at ``position`` begins."""
        return self._position_of(self.sequences_before(position) + batch - 1) + 1

    def start_of(self, step: int) -> int:
        """Where step ``step`` begins, for a run that began with step 0 at position 0."""
        return self.advance(0, 0, step)

    def advance(self, step: int, position: int, to_step: int) -> int:
        """Where step ``to_step`` begins, for a run whose earlier step ``step`` begins at ``position``.

        Not ``start_of(to_step)`` where the run's first steps were taken under another plan.
        """
        if to_step <= step:
            return position
        taken = self._sequences_of(to_step) - self._sequences_of(step)
        return self._position_of(self.sequences_before(position) + taken - 1) + 1

    def step_of(self, position: int) -> int:
        """The step s with ``start_of(s) <= position < start_of(s + 1)``; a skipped position has one too."""
        sequences = self.sequences_before(position)
        stage = bisect.bisect_right(self._stage_sequences, sequences) - 1
        batch = self.ramp[stage][1] if stage < len(self.ramp) else self.global_batch
        return self._stage_steps[stage] + (sequences - self._stage_sequences[stage]) // batch

    def sequences_before(self, position: int) -> int:
        """How many positions below ``position`` lie in no skipped range."""
        passed = bisect.bisect_right(self._range_starts, position)
        if passed == 0:
            return position
        return position - self._skipped[passed] + max(0, self.skip_ranges[passed - 1][1] - position)

    def identity(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "global_batch": self.global_batch,
            "ramp": [list(pair) for pair in self.ramp],
            "skip_ranges": [list(pair) for pair in self.skip_ranges],
        }

    def _sequences_of(self, step: int) -> int:
        """How many sequences the steps before ``step`` take."""
        stage = bisect.bisect_right(self._stage_steps, step) - 1
        return self._stage_sequences[stage] + (step - self._stage_steps[stage]) * self.batch(step)

    def _position_of(self, kept: int) -> int:
        """The position of the sequence ``kept``, where sequences are counted over positions that are not skipped."""
        return kept + self._skipped[bisect.bisect_right(self._kept_before, kept)]

    @functools.cached_property
    def _stage_steps(self) -> list[int]:
        """The first step of each stage of the ramp, and of the time after it."""
        return [0, *itertools.accumulate(steps for steps, _ in self.ramp)]

    @functools.cached_property
    def _stage_sequences(self) -> list[int]:
        """How many sequences are taken before each of these stages."""
        return [0, *itertools.accumulate(steps * batch for steps, batch in self.ramp)]

    @functools.cached_property
    def _range_starts(self) -> list[int]:
        return [start for start, _ in self.skip_ranges]

    @functools.cached_property
    def _skipped(self) -> list[int]:
        """How many positions the first 0, 1, 2, ... ranges skip."""
        return [0, *itertools.accumulate(stop - start for start, stop in self.skip_ranges)]

    @functools.cached_property
    def _kept_before(self) -> list[int]:
        """How many positions before each range are not skipped."""
        return [start - skipped for start, skipped in zip(self._range_starts, self._skipped[:-1], strict=True)]
