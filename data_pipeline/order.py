"""The order of a run: position -> (source, epoch, sequence), a pure function with an inverse and no state (law 1).

The mixture says which source a position draws from and the how-manieth draw of that source it is; permutations keyed
by (seed, source NAME, epoch) say which sequence that is. Adding a source, or weighing it otherwise, leaves the
sequence of samples of every other source (in ``windowed``: of every stratum of it) as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import UserError
from .full import Full
from .mixture import Phase
from .permutation import LARGEST, ORDER_VERSION, IntArray
from .windowed import Windowed
from .windows import Windows

Mode = Literal["full", "windowed"]


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
    """The order of a run in one of two modes.

    ``full``: any sequence of a source may come at any place of its epoch (local disks).
    ``windowed``: sources are read in windows of neighbouring sequences, each entered once an epoch (remote storage).

    Args:
        seed: the run's seed.
        sources: in the order that their indices follow; unique names.
        phases: weights that replace the sources' own from a later position on, each naming every source.
        mode: see above.
        windows: how ``windowed`` cuts the sources; only for it.

    Raises:
        UserError: no sources, equal names, a source without sequences, weights or phases the mixture refuses, or
            windows where there are none, or none where there must be.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[OrderSource],
        phases: Sequence[Phase] = (),
        mode: Mode = "full",
        windows: Windows | None = None,
    ) -> None:
        self.seed, self.sources, self.mode, self.windows = seed, tuple(sources), mode, windows
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"several sources are named {', '.join(map(repr, repeated))}. Give each its own name.")
        for source in self.sources:
            if not 1 <= source.sequences <= LARGEST:
                raise UserError(
                    f"source {source.name!r} has {source.sequences} sequences; it needs at least one. "
                    "Add data to it or remove it."
                )
        if (mode == "windowed") != (windows is not None):
            raise UserError(
                f"the order {mode!r} {'has no windows' if windows else 'needs the size and number of its windows'}. "
                "Give windows with the order 'windowed', and only with it."
            )
        sizes = {source.name: source.sequences for source in self.sources}
        phases = (Phase(0, {source.name: source.weight for source in self.sources}), *phases)
        self._positions = Windowed(seed, sizes, phases, windows) if windows else Full(seed, sizes, phases)
        self._sequences = np.array(list(sizes.values()), np.int64)
        self.sample_bases = np.cumsum(self._sequences) - self._sequences
        """int64 [S]: sequence q of source s is sample ``sample_bases[s] + q`` of the run, in every epoch."""

    def locate(self, start: int, count: int) -> Located:
        """What the positions ``start .. start + count - 1`` hold; cheapest per position in chunks of 1024 and more."""
        if start < 0 or count < 0:
            raise ValueError(f"positions start at 0: start {start}, count {count}")
        return Located(*self._positions.locate(start, count))

    def position_of(self, source: int, sequence: npt.ArrayLike, epoch: npt.ArrayLike) -> IntArray:
        """The positions at which a source's sequences [k] come in their epochs [k] (or one epoch); -1 for never.

        Raises:
            ValueError: the source has no such sequence.
        """
        sequences, epochs = np.broadcast_arrays(np.asarray(sequence, np.int64), np.asarray(epoch, np.int64))
        self._check_sequences(source, sequences)
        return self._positions.position_of(source, sequences, epochs)

    def window(self, source: int, sequences: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """First and stop of the window that each sequence [k] of a source lies in; int64 [k] each.

        The window is what is best fetched at once: it is the same in every epoch, entered once in each, and left for
        good in that epoch when all of its sequences were drawn. Where sequences come from anywhere (the order
        ``full``, and a source too small to be cut) it is the whole source.

        Raises:
            ValueError: the source has no such sequence.
        """
        indices = np.asarray(sequences, np.int64)
        self._check_sequences(source, indices)
        return self._positions.window(source, indices)

    def needed(self, end: int) -> IntArray:
        """How many sequences of each source the positions ``[0, end)`` draw, repeats counted; int64 [S]."""
        return self._positions.needed(end)

    def reads(self, source: int, sequences: npt.ArrayLike, start: int, end: int) -> int:
        """How many of the positions ``start .. end - 1`` hold one of these sequences [k] of a source, each given once.

        Costs by the sequence and the epoch, not by the position.

        Raises:
            ValueError: the source has no such sequence.
        """
        indices = np.asarray(sequences, np.int64)
        self._check_sequences(source, indices)
        return self._positions.reads(source, indices, start, end)

    def check_epochs(self, end: int, max_epochs: Mapping[str, int | None]) -> None:
        """Refuse a run over the positions ``[0, end)`` that repeats a source more often than it may (None: no limit).

        Raises:
            UserError: names every source that runs out, the position at which it does, what it has and what is needed.
        """
        problems = []
        for index, (source, needed) in enumerate(zip(self.sources, self.needed(end).tolist(), strict=True)):
            allowed = max_epochs.get(source.name)
            position = None if allowed is None else self._positions.repeats_at(index, allowed, end)
            if allowed is None or position is None:
                continue
            problem = (
                f"source {source.name!r} runs out at position {position}: it has {source.sequences} sequences and may "
                f"be read for {allowed} epoch{'s' * (allowed != 1)}, but the run up to position {end} needs {needed} "
                f"({needed / source.sequences:.2f} epochs)"
            )
            if needed <= allowed * source.sequences:
                problem += ", and the strata of the windowed order end a few draws before or after one another"
            problems.append(problem)
        if problems:
            raise UserError(
                f"{'; '.join(problems)}. "
                "Allow more epochs (max_epochs), lower the weight, train for fewer tokens or add data."
            )

    def identity(self) -> dict[str, Any]:
        """All that the order is a function of, besides the contents of the sources, as JSON values."""
        names = [source.name for source in self.sources]
        identity: dict[str, Any] = {
            "order_version": ORDER_VERSION,
            "mode": self.mode,
            "seed": self.seed,
            "mixture_block": self._positions.block,
            "sources": [{"name": source.name, "sequences": source.sequences} for source in self.sources],
            "phases": [
                {"start": start, "counts": dict(zip(names, counts.tolist(), strict=True))}
                for start, counts in self._positions.phases
            ],
        }
        if self.windows:
            identity |= {"strata": self.windows.strata, "window_sequences": self.windows.sequences}
        return identity

    def _check_sequences(self, source: int, sequences: IntArray) -> None:
        size = self.sources[source].sequences
        if strange := sequences[(sequences < 0) | (sequences >= size)].tolist():
            raise ValueError(f"source {self.sources[source].name!r} has {size} sequences, none of number {strange[0]}")


def difference(saved: Mapping[str, Any], current: Mapping[str, Any], position: int | None = None) -> str:
    """What differs between two :meth:`Order.identity` values, in words; empty when they give the same order.

    With a ``position``: the same order before it. A phase that begins there or later changes nothing of what comes
    before, in either mode: positions are counted from the start of their phase, draws over the phases before it.
    """
    if position is not None:
        saved, current = _before(position, saved), _before(position, current)
    changes = [
        f"{words} was {saved[key]} and is now {current[key]}"
        for key, words in (
            ("order_version", "the version of the order"),
            ("mode", "the order's mode"),
            ("seed", "the seed"),
            ("strata", "the number of strata"),
            ("window_sequences", "the number of sequences in a window"),
            ("mixture_block", "the length of a mixture block"),
        )
        if key in saved and key in current and saved[key] != current[key]
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
        changes += _phase_changes(saved, current)
    return "; ".join(changes)


def _before(position: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    phases = [phase for phase in identity["phases"] if phase["start"] < max(position, 1)]
    return {**identity, "phases": phases}


def _phase_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    starts, new_starts = ([phase["start"] for phase in one["phases"]] for one in (saved, current))
    if starts != new_starts:
        return [f"the mixture's phases started at positions {starts} and now start at {new_starts}"]
    block = saved["mixture_block"]
    if block != current["mixture_block"]:
        return []  # equal shares have other counts in a block of another length
    return [
        f"the share of source {name!r} from position {old['start']} on was {count}/{block} "
        f"and is now {new['counts'][name]}/{block}"
        for old, new in zip(saved["phases"], current["phases"], strict=True)
        for name, count in old["counts"].items()
        if count != new["counts"][name]
    ]
