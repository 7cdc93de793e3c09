"""The order of a run: position -> (source, epoch, sequence), a pure function with an inverse and no state (law 1).

The mixture says which source a position draws from and the how-manieth draw of that source it is; draw j of a source
with N sequences is draw ``j mod N`` of its epoch ``j // N``, and a permutation keyed by (seed, source NAME, epoch)
says which sequence that is. Adding a source, or weighing it otherwise, leaves the sequence of samples of every
other source as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import UserError
from .mixture import MIXTURE_BLOCK, Mixture, Phase
from .permutation import LARGEST, ORDER_VERSION, IntArray, UIntArray, derive_keys, invert, permute

_PURPOSE = "sequences"


@dataclass(frozen=True)
class OrderSource:
    """A source as the order sees it: its name (the key of its permutations), its size and its share of the mixture."""

    name: str
    sequences: int
    weight: float = 1.0


class Located(NamedTuple):
    """What some positions hold: indices of sources, epochs of those sources and sequences in them; int64 [count]."""

    source: IntArray
    epoch: IntArray
    sequence: IntArray


class Order:
    """The order ``full``: any sequence of a source may come at any place of its epoch.

    Args:
        seed: the run's seed.
        sources: in the order that their indices follow; unique names.
        phases: weights that replace the sources' own from a later position on, each naming every source.

    Raises:
        UserError: no sources, equal names, a source without sequences, or weights or phases the mixture refuses.
    """

    mode = "full"

    def __init__(self, seed: int, sources: Sequence[OrderSource], phases: Sequence[Phase] = ()) -> None:
        self.seed = seed
        self.sources = tuple(sources)
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"several sources are named {', '.join(map(repr, repeated))}. Give each its own name.")
        for source in self.sources:
            if not 1 <= source.sequences <= LARGEST:
                raise UserError(
                    f"source {source.name!r} has {source.sequences} sequences; it needs at least one. "
                    "Add data to it or remove it."
                )
        own = Phase(0, {source.name: source.weight for source in self.sources})
        self.mixture = Mixture(seed, (own, *phases))
        self._sequences = np.array([source.sequences for source in self.sources], np.int64)
        self.sample_bases = np.cumsum(self._sequences) - self._sequences
        """int64 [S]: sequence q of source s is sample ``sample_bases[s] + q`` of the run, in every epoch."""

    def locate(self, start: int, count: int) -> Located:
        """What the positions ``start .. start + count - 1`` hold; cheapest per position in chunks of 1024 and more."""
        source, ordinal = self.mixture.locate(start, count)
        epoch, index = np.divmod(ordinal, self._sequences[source])
        return Located(source, epoch, permute(index, self._sequences[source], self._keys(source, epoch)))

    def position_of(self, source: int, sequence: npt.ArrayLike, epoch: npt.ArrayLike) -> IntArray:
        """The positions at which a source's sequences [k] come in their epochs [k] (or one epoch); -1 for never."""
        sequences, epochs = np.broadcast_arrays(np.asarray(sequence, np.int64), np.asarray(epoch, np.int64))
        size = self.sources[source].sequences
        index = invert(sequences, size, self._keys(np.full(sequences.shape, source), epochs))
        return self.mixture.position_of(source, epochs * size + index)

    def needed(self, end: int) -> IntArray:
        """How many sequences of each source the positions ``[0, end)`` draw, repeats counted; int64 [S]."""
        return self.mixture.needed(end)

    def check_epochs(self, end: int, max_epochs: Mapping[str, int | None]) -> None:
        """Refuse a run over the positions ``[0, end)`` that repeats a source more often than it may (None: no limit).

        Raises:
            UserError: names every source that runs out, the position at which it does, what it has and what is needed.
        """
        problems = []
        for index, (source, needed) in enumerate(zip(self.sources, self.needed(end).tolist(), strict=True)):
            allowed = max_epochs.get(source.name)
            if allowed is None or needed <= allowed * source.sequences:
                continue
            position = self.mixture.position_of(index, np.array([allowed * source.sequences]))[0]
            problems.append(
                f"source {source.name!r} runs out at position {position}: it has {source.sequences} sequences and may "
                f"be read for {allowed} epoch{'s' * (allowed != 1)}, but the run up to position {end} needs {needed} "
                f"({needed / source.sequences:.2f} epochs)"
            )
        if problems:
            raise UserError(
                f"{'; '.join(problems)}. "
                "Allow more epochs (max_epochs), lower the weight, train for fewer tokens or add data."
            )

    def identity(self) -> dict[str, Any]:
        """All that the order is a function of, besides the contents of the sources, as JSON values."""
        names = self.mixture.names
        return {
            "order_version": ORDER_VERSION,
            "mode": self.mode,
            "seed": self.seed,
            "mixture_block": MIXTURE_BLOCK,
            "sources": [{"name": source.name, "sequences": source.sequences} for source in self.sources],
            "phases": [
                {"start": start, "counts": dict(zip(names, counts.tolist(), strict=True))}
                for start, counts in self.mixture.spans
            ],
        }

    def _keys(self, source: IntArray, epoch: IntArray) -> UIntArray:
        """The permutation keys of each (source, epoch), uint64 [k, 8]."""
        pairs, inverse = np.unique(np.stack([source, epoch]), axis=1, return_inverse=True)
        keys = [derive_keys(self.seed, _PURPOSE, self.sources[s].name, e) for s, e in pairs.T.tolist()]
        return np.stack(keys)[inverse] if keys else np.empty((0, 8), np.uint64)


def difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What differs between two :meth:`Order.identity` values, in words; empty when they give the same order."""
    changes = [
        f"{words} was {saved[key]} and is now {current[key]}"
        for key, words in (
            ("order_version", "the version of the order"),
            ("mode", "the order's mode"),
            ("seed", "the seed"),
            ("mixture_block", "the length of a mixture block"),
        )
        if saved[key] != current[key]
    ]
    before, now = ({source["name"]: source["sequences"] for source in one["sources"]} for one in (saved, current))
    changes += [f"source {name!r} is gone" for name in before if name not in now]
    changes += [f"source {name!r} is new" for name in now if name not in before]
    changes += [
        f"source {name!r} had {before[name]} sequences and now has {now[name]}"
        for name in before
        if name in now and before[name] != now[name]
    ]
    if before.keys() == now.keys():
        if list(before) != list(now):
            changes.append(f"the sources stood in the order {', '.join(before)} and now stand in {', '.join(now)}")
        changes += _phase_changes(saved["phases"], current["phases"])
    return "; ".join(changes)


def _phase_changes(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]]) -> list[str]:
    starts, new_starts = ([phase["start"] for phase in phases] for phases in (saved, current))
    if starts != new_starts:
        return [f"the mixture's phases started at positions {starts} and now start at {new_starts}"]
    return [
        f"the share of source {name!r} from position {old['start']} on was {count}/{MIXTURE_BLOCK} "
        f"and is now {new['counts'][name]}/{MIXTURE_BLOCK}"
        for old, new in zip(saved, current, strict=True)
        for name, count in old["counts"].items()
        if count != new["counts"][name]
    ]
