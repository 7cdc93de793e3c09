"""Steps of a run for one rank, made ahead by a thread; and finite batches of held-out data.

Within a step that takes the sequences s = 0, 1, 2, ... micro-step g, rank r of W and row i of b hold sequence
``g W b + r b + i``: the sequences of one micro-step over all ranks are neighbours in the order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import numpy as np

from .ahead import Ahead
from .batch_plan import BatchPlan
from .batches import HOLE, Batch, make_batch
from .block_memory import BlockMemory
from .damage import Damage, OnDamage
from .errors import UserError
from .order import Order
from .permutation import IntArray
from .reader import TokenSource
from .schedule import Schedule, step_offsets
from .step_reader import Step, StepReader
from .upcoming import Upcoming, neighbours
from .watchdog import Watchdog


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
        memory: keeps blocks of the sources; not for two loaders at once. None: one of its own.

    Raises:
        RuntimeError: another loader still uses ``memory``.
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
        memory: BlockMemory | None = None,
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
        upcoming = Upcoming(schedule, order, sources)
        memory = BlockMemory() if memory is None else memory
        self._reader = StepReader(upcoming, order, sources, memory, on_damage)
        self._make = self._make_pinned if pin_memory else self._reader.next_step
        self.position = start_position
        """Where the next step begins."""
        self.waited = 0.0
        """Seconds that the last :meth:`next_step` took: the data wait."""
        names = [source.name for source in order.sources]
        self._watchdog = None
        if watchdog_seconds is not None:
            self._watchdog = Watchdog(list(zip(names, sources, strict=True)), watchdog_seconds, on_wait)
        self._ahead = Ahead(self._make, prefetch) if prefetch else None
        if self._ahead:
            memory.may_be_written = self._ahead.is_running

    def next_step(self) -> Step:
        """The next step.

        Raises:
            StopIteration: the end step is reached.
            DataError: as :meth:`TokenSource.read`; comes in place of the step that could not be made.
        """
        step = self.next_step_unless(_never)
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

    def _make_pinned(self) -> Step:
        step = self._reader.next_step()
        step.micro_batches = tuple(batch.pin_memory() for batch in step.micro_batches)
        return step


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

    def nothing(self) -> Batch:
        """A batch of holes, for a rank that can't read its own while the others go on with theirs."""
        holes = np.full(len(self._offsets), HOLE)
        dtype = self._source.manifest.layout.token_dtype
        rows = np.full((len(holes), self._source.seq_len + 1), self._source.eos_id, dtype)
        batch = make_batch(rows, self._source.eos_id, np.full(len(holes), self._source_id), holes, holes)
        return batch.pin_memory() if self._pin_memory else batch

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


def _never() -> bool:
    return False


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
