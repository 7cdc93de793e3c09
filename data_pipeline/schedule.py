"""What each step of one rank holds, located chunk by chunk ahead of the reading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .batch_plan import BatchPlan
from .errors import UserError
from .order import Located, Order
from .permutation import IntArray

ORDER_CHUNK = 1024
"""Positions located in one go at first, at least: one by one, the order would cost a hundred times more."""
_LATER_CHUNK, _LARGEST_CHUNK = 8192, 65_536
"""And then, which costs half as much a position, but no start should wait for it. More where many ranks share them,
so that this one can read some together."""
_READ_TOGETHER = 128


@dataclass(slots=True)
class Steps:
    """One rank's share of some steps in a row, the sequences of one after those of the other.

    Attributes:
        edges: where each of the n steps begins, and where the one after the last does: n + 1 positions.
        global_batch: the sequences of each step over all ranks.
        shape: of each step: (micro-steps, micro-batch).
        positions, source, sequence: int64 [n * micro-steps * micro-batch], the position of each sequence, its source,
            and which it is there.
    """

    edges: tuple[int, ...]
    global_batch: int
    shape: tuple[int, int]
    positions: IntArray
    source: IntArray
    sequence: IntArray

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def sequences(self) -> int:
        """Of each step."""
        return self.shape[0] * self.shape[1]

    def part(self, first: int, stop: int) -> Steps:
        """The steps ``[first, stop)`` of them."""
        edges, rows = self.edges[first : stop + 1], slice(first * self.sequences, stop * self.sequences)
        return Steps(edges, self.global_batch, self.shape, self.positions[rows], self.source[rows], self.sequence[rows])


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
        self._ramp_end = sum(steps for steps, _ in plan.ramp)
        self._chunk, self._later = ORDER_CHUNK, max(_LATER_CHUNK, min(_LARGEST_CHUNK, _READ_TOGETHER * world_size))

    def next_chunk(self) -> Steps | None:
        """The steps that follow those of the call before, all of one global batch; ``None`` at the end."""
        if self._step >= self._end:
            return None
        batch = self._plan.batch(self._step)
        most = min(self._end - self._step, -(-self._chunk // batch))
        count = most if self._step >= self._ramp_end else 1
        while count < most and self._plan.batch(self._step + count) == batch:
            count += 1
        positions = self._plan.positions(self._position, count * batch)
        after = (positions[batch - 1 :: batch] + 1).tolist()
        offsets = self._offsets[batch]
        mine = (np.arange(0, count * batch, batch)[:, None] + offsets.ravel()).ravel()
        located = locate(self._order, positions)
        steps = Steps(
            (self._position, *after),
            batch,
            offsets.shape,
            positions[mine],
            located.source[mine],
            located.sequence[mine],
        )
        self._step, self._position, self._chunk = self._step + count, after[-1], self._later
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
