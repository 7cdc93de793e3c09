"""Steps of a run for one rank, made ahead by a thread; and finite batches of held-out data.

Within a step that begins at position p, micro-step g, rank r of W and row i of b hold position
``p + g W b + r b + i``: the sequences of one micro-step over all ranks are neighbours in the order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .batches import Batch, make_batch
from .errors import UserError
from .order import Located, Order
from .permutation import IntArray
from .reader import TokenSource

_ORDER_CHUNK = 1024
"""Positions located in one go, at least: one by one, the order would cost a hundred times more."""


@dataclass(frozen=True)
class Step:
    """One rank's share of an optimizer step that begins at ``position`` of the run."""

    position: int
    micro_batches: tuple[Batch, ...]


class StepLoader:
    """The steps of one rank over the positions ``[start_position, end_position)``; an iterator and a context manager.

    Only whole steps are made: fewer than ``global_batch`` positions may be left over at the end. The state is
    :attr:`position`; it counts steps handed out, never steps made ahead. No random state is used.

    Args:
        order: says what every position holds.
        sources: one for each source of the order, at the same index.
        rank: this rank.
        world_size: the number of ranks.
        micro_batch: sequences per rank and micro-step.
        global_batch: sequences per step over all ranks; a multiple of ``world_size * micro_batch``.
        seq_len: tokens per sequence; what the sources were opened with.
        start_position: of the first step: 0, or what a checkpoint kept.
        end_position: no step goes beyond it.
        prefetch: steps made ahead by a daemon thread; 0 makes each step when it is asked for.
        pin_memory: hand out page-locked tensors (needs CUDA).

    Raises:
        UserError: the global batch can't be divided so, or the sources do not fit the order or one another.
    """

    def __init__(
        self,
        order: Order,
        sources: Sequence[TokenSource],
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        global_batch: int,
        seq_len: int,
        start_position: int,
        end_position: int,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        _check_sources(order, sources, seq_len)
        self._offsets = step_offsets(rank, world_size, micro_batch, global_batch)
        self._order, self._sources, self._pin_memory = order, tuple(sources), pin_memory
        self._global_batch, self._end, self._next_made = global_batch, end_position, start_position
        self._chunk_start, self._chunk = start_position, order.locate(start_position, 0)
        self.position = start_position
        """Where the next step begins."""
        self.waited = 0.0
        """Seconds that the last :meth:`next_step` took: the data wait."""
        self._ahead = _Ahead(self._make, prefetch) if prefetch else None

    def next_step(self) -> Step:
        """The next step.

        Raises:
            StopIteration: no whole step is left before the end position.
            DataError: as :meth:`TokenSource.read`; comes in place of the step that could not be made.
        """
        began = time.perf_counter()
        step = self._ahead.take() if self._ahead else self._make()
        self.waited = time.perf_counter() - began
        self.position += self._global_batch
        return step

    def __iter__(self) -> Iterator[Step]:
        return self

    __next__ = next_step

    def close(self) -> None:
        """End the thread, after the step it is at. The sources stay open."""
        if self._ahead:
            self._ahead.close()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> Step:
        position = self._next_made
        if position + self._global_batch > self._end:
            raise StopIteration
        if position + self._global_batch > self._chunk_start + len(self._chunk.source):
            steps = -(-_ORDER_CHUNK // self._global_batch)
            self._chunk_start, self._chunk = position, self._order.locate(position, steps * self._global_batch)
        mine = self._offsets + (position - self._chunk_start)
        located = Located(*(values[mine] for values in self._chunk))
        rows = _read(self._sources, located)
        sample_ids = self._order.sample_bases[located.source] + located.sequence
        batches = (
            make_batch(rows[g], self._sources[0].eos_id, located.source[g], sample_ids[g], position + self._offsets[g])
            for g in range(len(rows))
        )
        step = Step(position, tuple(batch.pin_memory() if self._pin_memory else batch for batch in batches))
        self._next_made = position + self._global_batch
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

    Raises:
        UserError: ``sequences`` is not positive.
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
    ) -> None:
        if sequences is not None and sequences < 1:
            raise UserError(f"an evaluation of {sequences} sequences measures nothing. Ask for 1 or more, or for all.")
        self._source, self._source_id, self._pin_memory = source, source_id, pin_memory
        self.sequences = source.sequences if sequences is None else min(sequences, source.sequences)
        """The number of sequences that all ranks together see."""
        self._per_batch = world_size * micro_batch
        self._offsets = step_offsets(rank, world_size, micro_batch, self._per_batch)[0]

    def __len__(self) -> int:
        return -(-self.sequences // self._per_batch)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            indices = number * self._per_batch + self._offsets
            indices = np.where(indices < self.sequences, indices, -1)
            rows = self._source.read(np.maximum(indices, 0))
            source_ids = np.full(len(indices), self._source_id)
            batch = make_batch(rows, self._source.eos_id, source_ids, indices, indices)
            yield batch.pin_memory() if self._pin_memory else batch


def step_offsets(rank: int, world_size: int, micro_batch: int, global_batch: int) -> IntArray:
    """A rank's positions within a step, int64 [micro-steps, micro_batch], counted from the step's first.

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


def _read(sources: Sequence[TokenSource], located: Located) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The tokens of the located sequences [G, b], as [G, b, T + 1]."""
    dtype = np.result_type(*(source.manifest.dtype for source in sources))
    rows = np.empty((*located.source.shape, sources[0].seq_len + 1), dtype)
    for source in np.unique(located.source).tolist():
        here = located.source == source
        rows[here] = sources[source].read(located.sequence[here])
    return rows


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
                f"the data set {source.folder} of source {ordered.name!r} was made with another tokenizer "
                f"({source.manifest.tokenizer_sha256[:12]}...) than {sources[0].folder} of source "
                f"{order.sources[0].name!r} ({first.tokenizer_sha256[:12]}...). "
                "Prepare one of them again with the other's tokenizer.model."
            )


class _Ahead:
    """A daemon thread that calls ``make`` and keeps up to ``depth`` steps ready.

    The first exception ends the thread; it is handed out after the steps made before it, and at every call from then
    on (the end of the data is such an exception too).
    """

    def __init__(self, make: Callable[[], Step], depth: int) -> None:
        self._make, self._depth = make, depth
        self._ready: deque[Step] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="step-loader", daemon=True)
        self._thread.start()

    def take(self) -> Step:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed)
            if self._closed:
                raise RuntimeError("the step loader is closed")
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                step = self._make()
                with self._changed:
                    self._ready.append(step)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the next step
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            return not self._closed
