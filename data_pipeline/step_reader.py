"""Steps of one rank, read: several small ones at once, for reading costs more by the call than by the row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .batches import HOLE, Batch, BatchMaker
from .block_memory import BlockMemory
from .checked_blocks import Damaged
from .damage import Damage, OnDamage
from .kernel import load
from .order import Order
from .permutation import IntArray
from .reader import TokenSource
from .recycled import Recycled
from .rows import Part, Rows
from .schedule import Steps
from .upcoming import Upcoming, windows_of

_BYTES_AT_ONCE = 8 << 20
"""Of tokens that are read in one go, at most,"""
_SECONDS_AT_ONCE = 0.01
"""and how long that may take: a step that is ready must not wait long for those that come later."""


@dataclass(eq=False, slots=True)
class Step:
    """One rank's share of an optimizer step.

    Attributes:
        position: where the step begins.
        next_position: where the next step does; not always ``position + global_batch``, for ranges may be skipped.
        global_batch: sequences of the step over all ranks.
        micro_batches: this rank's, in their order.
        damage: of this rank's rows: the holes in ``micro_batches``.
    """

    position: int
    next_position: int
    global_batch: int
    micro_batches: tuple[Batch, ...]
    damage: tuple[Damage, ...] = ()


class StepReader:
    """Reads steps one after the other. Not for several threads at once.

    Args:
        upcoming: the steps.
        order: what they were located by.
        sources: those of the order, at the same indices.
        memory: keeps blocks of the sources; lent to nobody else.
        on_damage: as in :class:`~data_pipeline.StepLoader`.
    """

    def __init__(
        self,
        upcoming: Upcoming,
        order: Order,
        sources: Sequence[TokenSource],
        memory: BlockMemory,
        on_damage: OnDamage,
    ) -> None:
        self._upcoming, self._order, self._sources, self._on_damage = upcoming, order, tuple(sources), on_damage
        self._blocks, self._kept = memory, memory.lend(sources)
        self._kernel, self._memory, self._at_once = load(), Recycled(()), 1
        self._row_bytes = max((source.seq_len + 1) * source.manifest.layout.token_bytes for source in sources)
        self._located: Steps | None = None
        """Steps that could not be read together with those before."""
        self._made: Iterator[Step] = iter(())

    def next_step(self) -> Step:
        """The next step.

        Raises:
            StopIteration: there is none.
            DataError, OSError: it can't be read; again at every call.
        """
        step = next(self._made, None)
        if step is None:
            self._made = self._read_together()
            step = next(self._made)
        return step

    def _read_together(self) -> Iterator[Step]:
        steps = self._located or self._upcoming.take(self._at_once)
        self._located, began = steps, time.perf_counter()
        try:
            rows, damaged = self._read(steps)
        except OSError:
            if len(steps) == 1:
                raise
            steps = steps.part(0, 1)  # the disk may have failed in a later one, which must not hold up this one
            rows, damaged = self._read(steps)
        quick = time.perf_counter() - began < _SECONDS_AT_ONCE
        count = len(steps.sequence)
        self._at_once = min(4 * count, _BYTES_AT_ONCE // self._row_bytes) if quick else count // 2
        if damaged and self._on_damage == "stop":
            first = min(damaged)
            if not (whole := first // steps.sequences):
                raise damaged[first]
            steps, damaged = steps.part(0, whole), {}
        left = len(self._located) - len(steps)
        self._located = self._located.part(len(steps), len(steps) + left) if left else None
        return self._make(steps, rows, damaged)

    def _make(self, steps: Steps, rows: Rows, damaged: Damaged) -> Iterator[Step]:
        sample_ids = self._order.sample_bases[steps.source] + steps.sequence
        holes: dict[int, tuple[Damage, ...]] = {}
        for row in sorted(damaged):
            name, position = self._order.sources[steps.source[row]].name, int(steps.positions[row])
            hole = Damage.of(damaged[row], position, name, int(sample_ids[row]))
            number = row // steps.sequences
            holes[number] = (*holes.get(number, ()), hole)
            sample_ids[row] = HOLE
        edges, (micro_steps, size) = steps.edges, steps.shape
        eos_id = self._sources[0].eos_id
        widen = self._kernel.widen(rows, eos_id, sample_ids, size)
        maker = BatchMaker(widen, eos_id, steps.source, sample_ids, steps.positions, size)
        if self._memory.shape != (size, rows.length):
            self._memory = Recycled((size, rows.length))
        make, take = maker.make, self._memory.take
        for number in range(len(steps)):
            first = number * micro_steps
            batches = tuple([make(first + k, take()) for k in range(micro_steps)])
            yield Step(edges[number], edges[number + 1], steps.global_batch, batches, holes.get(number, ()))

    def _read(self, steps: Steps) -> tuple[Rows, Damaged]:
        """Where the tokens of the steps lie, [n, T + 1], and what is wrong with them, by row."""
        self._blocks.release()
        if len(self._sources) == 1:
            return self._read_source(0, steps.sequence)
        parts: list[Part] = []
        damaged: Damaged = {}
        for number in np.unique(steps.source).tolist():
            places = np.flatnonzero(steps.source == number)
            rows, wrong = self._read_source(number, steps.sequence[places])
            parts += rows.at(places)
            damaged |= {int(places[row]): error for row, error in wrong.items()}
        return Rows(len(steps.source), parts), damaged

    def _read_source(self, number: int, sequences: IntArray) -> tuple[Rows, Damaged]:
        windows = windows_of(self._order, self._sources, number, sequences)
        return self._sources[number].find_or_damage(sequences, windows, self._kept[number])
