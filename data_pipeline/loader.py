"""Steps of a run for one rank, made ahead by a thread; and finite batches of held-out data.

Within a step that takes the sequences s = 0, 1, 2, ... micro-step g, rank r of W and row i of b hold sequence
``g W b + r b + i``: the sequences of one micro-step over all ranks are neighbours in the order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .ahead import Ahead
from .batch_plan import BatchPlan
from .batches import HOLE, Batch, make_batch
from .damage import Damage, DamagedBlockError, OnDamage
from .errors import UserError
from .order import Order
from .permutation import IntArray
from .reader import TokenSource
from .schedule import LocatedStep, Schedule, step_offsets
from .upcoming import Upcoming, neighbours, windows_of
from .watchdog import Watchdog

Rows = npt.NDArray[np.unsignedinteger[Any]]

_BYTES_AT_ONCE = 1 << 20
"""Of tokens read in one go; they stay in the processor's cache until they are cast."""


@dataclass(frozen=True)
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


class StepLoader:
    """The steps ``[start_step, end_step)`` of one rank; an iterator and a context manager.

    The state is :attr:`position`; it counts steps handed out, never steps made ahead. No random state is used.

    Args:
        order: says what every position holds.
        sources: one for each source of the order, at the same index.
        rank: this rank.
        world_size: the number of ranks.
        micro_batch: sequences per rank and micro-step.
        plan: says which positions each step takes; each batch a multiple of ``world_size * micro_batch``.
        seq_len: tokens per sequence; what the sources were opened with.
        start_step: the first step: 0, or what a checkpoint kept.
        start_position: where it begins: 0, or what a checkpoint kept.
        end_step: the step after the last one.
        prefetch: steps made ahead by a daemon thread; 0 makes each step when it is asked for.
        pin_memory: hand out page-locked tensors (needs CUDA).
        on_damage: ``"hole"``: a sequence that is damaged becomes a hole at its position, told of by
            :attr:`Step.damage`; ``"stop"``: an error in place of its step.
        watchdog_seconds: how long one read may take before ``on_wait`` is told; None: for ever.
        on_wait: takes a message that names what a read waits for, in another thread.

    Raises:
        UserError: a batch can't be divided so, or the sources do not fit the order or one another.
    """

    def __init__(
        self,
        order: Order,
        sources: Sequence[TokenSource],
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        plan: BatchPlan,
        seq_len: int,
        start_step: int,
        start_position: int,
        end_step: int,
        prefetch: int = 2,
        pin_memory: bool = False,
        on_damage: OnDamage = "stop",
        watchdog_seconds: float | None = None,
        on_wait: Callable[[str], None] = print,
    ) -> None:
        _check_sources(order, sources, seq_len)
        schedule = Schedule(
            order,
            plan,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
            step=start_step,
            position=start_position,
            end_step=end_step,
        )
        self._order, self._sources = order, tuple(sources)
        self._upcoming = Upcoming(schedule, order, self._sources)
        self._pin_memory, self._on_damage = pin_memory, on_damage
        self._rows: Rows = np.empty((0, seq_len + 1), sources[0].manifest.layout.token_dtype)
        self._at_once = 1
        self._located: list[LocatedStep] = []
        """Steps to be read next."""
        self._ready: deque[tuple[LocatedStep, Rows, dict[int, DamagedBlockError]]] = deque()
        """Steps that are read, with their tokens in ``_rows`` and what is wrong with them."""
        self.position = start_position
        """Where the next step begins."""
        self.waited = 0.0
        """Seconds that the last :meth:`next_step` took: the data wait."""
        names = [source.name for source in order.sources]
        self._watchdog = None
        if watchdog_seconds is not None:
            self._watchdog = Watchdog(list(zip(names, sources, strict=True)), watchdog_seconds, on_wait)
        self._ahead = Ahead(self._make, prefetch) if prefetch else None

    def next_step(self) -> Step:
        """The next step.

        Raises:
            StopIteration: the end step is reached.
            DataError: as :meth:`TokenSource.read`; comes in place of the step that could not be made.
        """
        step = self.next_step_unless(lambda: False)
        assert step is not None
        return step

    def next_step_unless(self, give_up: Callable[[], bool]) -> Step | None:
        """As :meth:`next_step`, but ``None`` if ``give_up`` says so while the step is waited for (not with prefetch 0).

        Nothing is lost by it: the next call has the step.
        """
        began = time.perf_counter()
        step = self._ahead.take(give_up) if self._ahead else self._make()
        self.waited = time.perf_counter() - began
        if step is not None:
            self.position = step.next_position
        return step

    def __iter__(self) -> Iterator[Step]:
        return self

    __next__ = next_step

    def close(self) -> None:
        """End the threads, after the step they are at. The sources stay open."""
        if self._ahead:
            self._ahead.close()
        if self._watchdog:
            self._watchdog.close()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> Step:
        if not self._ready:
            self._read_next()
        step, rows, damaged = self._ready[0]
        sample_ids = self._order.sample_bases[step.source] + step.sequence
        damage = []
        for row, error in sorted(damaged.items()):
            if self._on_damage == "stop":
                raise error
            name = self._order.sources[step.source.flat[row]].name
            damage.append(Damage.of(error, int(step.positions.flat[row]), name, int(sample_ids.flat[row])))
            sample_ids.flat[row] = HOLE
        self._ready.popleft()
        # one piece of memory a step: many smaller ones are given back to the system, and faulted in anew, at every step
        into, eos_id = np.empty(rows.shape, np.int64), self._sources[0].eos_id
        batches = (
            make_batch(rows[g], eos_id, step.source[g], sample_ids[g], step.positions[g], into[g])
            for g in range(len(rows))
        )
        made = tuple(batch.pin_memory() if self._pin_memory else batch for batch in batches)
        return Step(step.position, step.next_position, step.global_batch, made, tuple(damage))

    def _read_next(self) -> None:
        """Read the next steps: several of few sequences at once, for a read costs more by itself than by the row."""
        if not self._located:
            self._located = self._upcoming.take(self._at_once)
        steps = self._located
        try:
            damage = self._read(steps)
        except OSError:
            if len(steps) == 1:
                raise
            steps = steps[:1]  # the disk may have failed in a later one, which must not hold up this one
            damage = self._read(steps)
        self._located, begin = self._located[len(steps) :], 0
        for step in steps:
            stop = begin + step.positions.size
            own = {row - begin: error for row, error in damage.items() if begin <= row < stop} if damage else {}
            self._ready.append((step, self._rows[begin:stop].reshape(*step.positions.shape, -1), own))
            begin = stop
        # the first step alone, for it is waited for
        self._at_once = max(1, _BYTES_AT_ONCE // self._rows[:1].nbytes)

    def _read(self, steps: Sequence[LocatedStep]) -> dict[int, DamagedBlockError]:
        """Fill ``_rows`` [n, T + 1] with the tokens of the steps; returns what is wrong, by row."""
        sources = np.concatenate([step.source.ravel() for step in steps])
        sequences = np.concatenate([step.sequence.ravel() for step in steps])
        if len(self._rows) < len(sources):
            # one buffer for all steps: batches hold copies of it, and fresh memory costs more than reading into it
            self._rows = np.empty((len(sources), self._rows.shape[1]), self._rows.dtype)
        damage: dict[int, DamagedBlockError] = {}
        for number in np.unique(sources).tolist():
            places = np.flatnonzero(sources == number)
            windows = windows_of(self._order, self._sources, number, sequences[places])
            damage |= self._sources[number].read_into(sequences[places], self._rows, places, windows)
        return damage


class EvaluationLoader:
    """The first sequences of a source in index order, split over the ranks; can be iterated over again and again.

    Every rank gets the same number of batches of the same shape: what is missing in the last one are holes
    (:class:`Batch`). Batch g of rank r of W holds the indices ``g W b + r b + i``.

    Args:
        source: usually a held-out split.
        rank: this rank.
        world_size: the number of ranks.
        micro_batch: sequences per batch.
        sequences: how many of the source's sequences, at most; ``None``: all.
        source_id: what the batches' ``source_ids`` say.
        pin_memory: hand out page-locked tensors (needs CUDA).
        on_damage: ``"hole"``: a sequence that is damaged becomes a hole, told of by :attr:`damage`.
        name: the source's, for :attr:`damage`.

    Raises:
        UserError: fewer than one sequence is asked for.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        sequences: int | None = None,
        source_id: int = 0,
        pin_memory: bool = False,
        on_damage: OnDamage = "stop",
        name: str = "heldout",
    ) -> None:
        if sequences is not None and sequences < 1:
            raise UserError(f"an evaluation of {sequences} sequences measures nothing. Ask for 1 or more, or for all.")
        self._source, self._source_id, self._pin_memory = source, source_id, pin_memory
        self._on_damage, self._name = on_damage, name
        self.sequences = source.sequences if sequences is None else min(sequences, source.sequences)
        """The number of sequences that all ranks together see."""
        self.damage: list[Damage] = []
        """The holes of this rank since the iteration began, those that only fill up left out."""
        self._per_batch = world_size * micro_batch
        self._offsets = step_offsets(rank, world_size, micro_batch, self._per_batch)[0]

    def __len__(self) -> int:
        return -(-self.sequences // self._per_batch)

    def __iter__(self) -> Iterator[Batch]:
        self.damage = []
        fetched = 0
        for number in range(len(self)):
            if self._source.remote:
                fetched = self._fetch_ahead(fetched)
            indices = self._indices(number)
            wanted = np.maximum(indices, 0)
            rows, damage = self._source.read_or_damage(wanted, self._windows(wanted))
            sample_ids = indices.copy()
            for row, error in sorted(damage.items()):
                if indices[row] == HOLE:
                    continue
                if self._on_damage == "stop":
                    raise error
                self.damage.append(Damage.of(error, int(indices[row]), self._name, int(indices[row])))
                sample_ids[row] = HOLE
            source_ids = np.full(len(indices), self._source_id)
            batch = make_batch(rows, self._source.eos_id, source_ids, sample_ids, indices)
            yield batch.pin_memory() if self._pin_memory else batch

    def _fetch_ahead(self, number: int) -> int:
        """Begin to fetch for the batches from ``number`` on; returns the first one for which it was not begun."""
        while number < len(self):
            wanted = np.maximum(self._indices(number), 0)
            if not self._source.fetch_ahead(wanted, neighbours(self._source, wanted)):
                break
            number += 1
        return number

    def _windows(self, sequences: IntArray) -> IntArray | None:
        return neighbours(self._source, sequences) if self._source.remote else None

    def _indices(self, number: int) -> IntArray:
        """What this rank's batch ``number`` holds, int64 [b]; -1 beyond the end."""
        indices = number * self._per_batch + self._offsets
        return np.where(indices < self.sequences, indices, HOLE)


def _check_sources(order: Order, sources: Sequence[TokenSource], seq_len: int) -> None:
    if len(sources) != len(order.sources):
        raise ValueError(f"{len(sources)} sources were opened for an order of {len(order.sources)}")
    first = sources[0].manifest
    for ordered, source in zip(order.sources, sources, strict=True):
        if source.seq_len != seq_len or source.sequences != ordered.sequences:
            raise ValueError(
                f"source {ordered.name!r} has {source.sequences} sequences of {source.seq_len} tokens; the order and "
                f"the loader were made for {ordered.sequences} of {seq_len}"
            )
        if source.manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"the data set {source.root} of source {ordered.name!r} was made with another tokenizer "
                f"({source.manifest.tokenizer_sha256[:12]}...) than {sources[0].root} of source "
                f"{order.sources[0].name!r} ({first.tokenizer_sha256[:12]}...). "
                "Prepare one of them again with the other's tokenizer.model."
            )
