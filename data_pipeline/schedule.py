"""What each step of one rank holds, located chunk by chunk ahead of the reading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .batch_plan import BatchPlan
from .errors import UserError
from .order import Located, Order
from .permutation import IntArray

ORDER_CHUNK = 1024
"""Positions located in one go, at least: one by one, the order would cost a hundred times more."""


@dataclass(frozen=True)
class LocatedStep:
    """One rank's share of a step, G micro-steps of b sequences.

    Attributes:
        position: where the step begins.
        next_position: where the next one does.
        global_batch: its sequences over all ranks.
        positions, source, sequence: int64 [G, b], the position of each sequence, its source, and which it is there.
    """

    position: int
    next_position: int
    global_batch: int
    positions: IntArray
    source: IntArray
    sequence: IntArray


class Schedule:
    """The steps of one rank from ``step`` on, where ``position`` is the step's first.

    Raises:
        UserError: a batch of the plan can't be divided over ranks and micro-batches.
    """

    def __init__(
        self,
        order: Order,
        plan: BatchPlan,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        step: int,
        position: int,
        end_step: int,
    ) -> None:
        self._order, self._plan, self._end = order, plan, end_step
        batches = {plan.global_batch, *(batch for _, batch in plan.ramp)}
        self._offsets = {batch: step_offsets(rank, world_size, micro_batch, batch) for batch in batches}
        self._step, self._position = step, position

    def next_chunk(self) -> list[LocatedStep]:
        """The steps that follow those of the call before; at least 1024 positions of them unless the run ends, none
        at its end."""
        batches: list[int] = []
        while self._step + len(batches) < self._end and sum(batches) < ORDER_CHUNK:
            batches.append(self._plan.batch(self._step + len(batches)))
        if not batches:
            return []
        positions = self._plan.positions(self._position, sum(batches))
        located = locate(self._order, positions)
        steps, begin = [], 0
        for batch in batches:
            mine = begin + self._offsets[batch]
            begin += batch
            after = int(positions[begin - 1]) + 1
            steps.append(
                LocatedStep(self._position, after, batch, positions[mine], located.source[mine], located.sequence[mine])
            )
            self._position = after
        self._step += len(batches)
        return steps


def locate(order: Order, positions: IntArray) -> Located:
    """What the ascending ``positions`` [n] hold. Small gaps are located too, large ones are passed over."""
    cuts = np.flatnonzero(np.diff(positions) > ORDER_CHUNK) + 1
    parts = []
    for run in np.split(positions, cuts):
        first, last = int(run[0]), int(run[-1])
        whole = order.locate(first, last + 1 - first)
        parts.append([values[run - first] for values in whole] if last + 1 - first > len(run) else whole)
    return Located(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def step_offsets(rank: int, world_size: int, micro_batch: int, global_batch: int) -> IntArray:
    """A rank's places within a step, int64 [micro-steps, micro_batch], counted from the step's first sequence.

    Raises:
        UserError: ``global_batch`` is not a multiple of ``world_size * micro_batch``.
    """
    per_micro_step = world_size * micro_batch
    if per_micro_step < 1 or global_batch < 1 or global_batch % per_micro_step:
        raise UserError(
            f"a global batch of {global_batch} sequences can't be divided into micro-batches of {micro_batch} on "
            f"{world_size} ranks: it must be a multiple of {micro_batch} x {world_size} = {per_micro_step}."
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    starts = np.arange(0, global_batch, per_micro_step)
    return starts[:, None] + (rank * micro_batch + np.arange(micro_batch))
