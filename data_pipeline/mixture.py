"""Which source each position of the run draws from: exact integer counts in every block, no random state.

Weights become integer counts that sum to 65,536, and every block of 65,536 positions holds exactly that many of each
source. Within a block the sources are interleaved by stratified jitter: item k of a source with count c stands at
``(k + u) / c`` of the block with a keyed u in [0, 1), so that a prefix of a block is close to the exact ratio too: with
S sources, the number drawn from a source of share w among the first m positions lies within ``1 + w (S - 2)`` of
``w m``. A source's ordinals appear in increasing order, so it is consumed epoch after epoch.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .errors import UserError
from .permutation import LARGEST, IntArray, derive_keys, mix64

MIXTURE_BLOCK = 65_536
_CACHED_BLOCKS = 4


@dataclass(frozen=True)
class Phase:
    """From position ``start`` on, the sources are drawn with these weights (any positive scale, by source name)."""

    start: int
    weights: Mapping[str, float]


def quantise_weights(weights: Mapping[str, float], block: int = MIXTURE_BLOCK) -> IntArray:
    """Integer counts int64 [S] that sum to ``block``, nearest to the weights' shares (largest remainder method).

    Raises:
        UserError: a weight is negative or not finite, none is positive, or a positive one would be rounded to nothing.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"source {name!r} has the weight {weight}. Give a finite number that is not negative.")
    total = sum((Fraction(weight) for weight in weights.values()), Fraction(0))
    if total == 0:
        raise UserError(f"no source has a positive weight (sources: {', '.join(weights) or 'none'}). Raise one.")
    shares = [Fraction(weight) * block / total for weight in weights.values()]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: (counts[source] - shares[source], source))
    for source in by_remainder[: block - sum(counts)]:
        counts[source] += 1
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if weight > 0 and count == 0:
            raise UserError(
                f"source {name!r} has {weight / float(total):.2e} of the total weight, less than the mixture resolves "
                f"(1/{block}), and would never be drawn. Raise its weight to at least "
                f"{float(total) / block:.3g} or set it to 0."
            )
    return np.array(counts, np.int64)


def phase_counts(phases: Sequence[Phase], block: int = MIXTURE_BLOCK) -> tuple[tuple[int, IntArray], ...]:
    """The start and the counts [S] in ``block`` positions of every phase; sources in the order of the first phase.

    Raises:
        UserError: weights that :func:`quantise_weights` refuses, phases out of order or over other sources.
    """
    if not phases or phases[0].start != 0:
        raise UserError("the first phase of a mixture starts at position 0.")
    names = tuple(phases[0].weights)
    for before, phase in itertools.pairwise(phases):
        missing = [name for name in names if name not in phase.weights]
        strange = [name for name in phase.weights if name not in names]
        if missing or strange:
            problem = f"gives no weight to {missing}" if missing else f"names {strange}, which is no source"
            raise UserError(
                f"the mixture phase that starts at position {phase.start} {problem}. "
                f"Give each of {', '.join(names)} a weight (0 leaves it out)."
            )
        if phase.start <= before.start:
            raise UserError(
                f"the mixture phase that starts at position {phase.start} follows one that starts at "
                f"{before.start}. Order the phases by their starts, each later than the one before."
            )
    return tuple(
        (phase.start, quantise_weights({name: phase.weights[name] for name in names}, block)) for phase in phases
    )


class _Span(NamedTuple):
    """A phase with its counts [S] and the number of each source's ordinals used before it [S]."""

    start: int
    counts: IntArray
    used: IntArray


class _Table(NamedTuple):
    """One block's interleave. By slot: the source and the rank in it; by item, source after source: the slot."""

    source: IntArray
    rank: IntArray
    slot: IntArray


class Mixture:
    """The map position -> (source, ordinal) and its inverse. Ordinals of a source count its draws from position 0 on.

    Args:
        seed: the run's seed.
        phases: in the order of their starts, the first at 0, each with a weight for the same sources. A phase may
            begin at any position; ordinals go on over it, and its blocks are counted from its start.

    Raises:
        UserError: weights or phases that :func:`phase_counts` refuses.
    """

    def __init__(self, seed: int, phases: Sequence[Phase]) -> None:
        counted = phase_counts(phases)
        self.seed = seed
        self.names = tuple(phases[0].weights)
        self._table = functools.lru_cache(maxsize=_CACHED_BLOCKS)(self._build_table)
        self._spans: list[_Span] = []
        for start, counts in counted:
            self._append(start, counts)
        self._starts = [span.start for span in self._spans]

    @property
    def spans(self) -> tuple[tuple[int, IntArray], ...]:
        """Start and counts [S] of every phase."""
        return tuple((span.start, span.counts) for span in self._spans)

    def locate(self, start: int, count: int) -> tuple[IntArray, IntArray]:
        """Source [count] and ordinal in the source [count] of the positions ``start .. start + count - 1``; int64.

        Entering a block costs a few milliseconds, whatever its number; blocks in use are kept.
        """
        if start < 0 or count < 0:
            raise ValueError(f"positions start at 0: start {start}, count {count}")
        source, ordinal = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            number, block = self._block_at(start + done)
            first = start + done - self._block_start(number, block)
            taken = min(MIXTURE_BLOCK - first, count - done, self._phase_end(number) - start - done)
            table, slots = self._table(number, block), slice(first, first + taken)
            span = self._spans[number]
            source[done : done + taken] = table.source[slots]
            base = span.used + block * span.counts
            ordinal[done : done + taken] = base[table.source[slots]] + table.rank[slots]
            done += taken
        return source, ordinal

    def position_of(self, source: int, ordinals: IntArray) -> IntArray:
        """The position at which each ordinal [k] of a source is drawn, int64 [k]; -1 for one that never is."""
        positions = np.full(len(ordinals), -1, np.int64)
        used = np.array([span.used[source] for span in self._spans])
        # a phase that draws none of the source has its successor's base: the last of equals is the one that draws
        numbers = np.searchsorted(used, ordinals, side="right") - 1
        counts = np.array([span.counts[source] for span in self._spans])[numbers]
        drawn = np.flatnonzero((counts > 0) & (ordinals >= 0))
        blocks, ranks = np.divmod(ordinals[drawn] - used[numbers[drawn]], counts[drawn])
        for number, block in {(int(n), int(b)) for n, b in zip(numbers[drawn], blocks, strict=True)}:
            if self._block_start(number, block) >= LARGEST:
                continue
            here = (numbers[drawn] == number) & (blocks == block)
            item = int(self._spans[number].counts[:source].sum()) + ranks[here]
            positions[drawn[here]] = self._block_start(number, block) + self._table(number, block).slot[item]
        return positions

    def needed(self, end: int) -> IntArray:
        """How many ordinals of each source the positions ``[0, end)`` use, int64 [S]."""
        if end == 0:
            return np.zeros(len(self.names), np.int64)
        return self._used_before(end, *self._block_at(end - 1))

    def _append(self, start: int, counts: IntArray) -> None:
        used = np.zeros(len(self.names), np.int64)
        if self._spans:
            last = len(self._spans) - 1
            block = (start - 1 - self._spans[last].start) // MIXTURE_BLOCK
            used = self._used_before(start, last, block)
        self._spans.append(_Span(start, counts, used))

    def _used_before(self, end: int, number: int, block: int) -> IntArray:
        """Ordinals used in ``[0, end)``, where ``end`` lies in this block of this phase, or at its end."""
        span = self._spans[number]
        slots = end - self._block_start(number, block)
        inside = np.bincount(self._table(number, block).source[:slots], minlength=len(self.names))
        return span.used + block * span.counts + inside

    def _block_at(self, position: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._starts, position) - 1
        return number, (position - self._starts[number]) // MIXTURE_BLOCK

    def _block_start(self, number: int, block: int) -> int:
        return self._spans[number].start + block * MIXTURE_BLOCK

    def _phase_end(self, number: int) -> int:
        return self._starts[number + 1] if number + 1 < len(self._starts) else 1 << 63

    def _build_table(self, number: int, block: int) -> _Table:
        counts = self._spans[number].counts
        start = self._block_start(number, block)
        source = np.repeat(np.arange(len(counts)), counts)
        rank = np.arange(MIXTURE_BLOCK) - np.repeat(np.cumsum(counts) - counts, counts)
        # the start, not the block's number, is in the key: equal blocks of two phases are jittered apart
        keys = np.array([derive_keys(self.seed, "mixture", name, start)[0] for name in self.names])
        jitter = mix64(rank.astype(np.uint64) + keys[source]) >> np.uint64(32)
        place = ((rank.astype(np.uint64) << np.uint64(32)) + jitter) // counts[source].astype(np.uint64)
        by_slot = np.argsort(place, kind="stable")
        slot = np.empty(MIXTURE_BLOCK, np.int64)
        slot[by_slot] = np.arange(MIXTURE_BLOCK)
        return _Table(source[by_slot], rank[by_slot], slot)
