"""Shards that ``data.on_damage: hole`` lets be missing: what the run loses by them, known before it begins (law 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_pipeline.errors import DataError, UserError
from data_pipeline.permutation import IntArray

from .config import Config
from .data import RunData

MOST_LOOKED_AT = 1 << 21
"""Sequences of a source whose places in the order are found; seconds. What more are missing only makes it worse."""


@dataclass(frozen=True)
class Missing:
    """What is known to be missing of a run."""

    shards: int
    """Without file or block index, of the training split of its local data sets: remote ones are not asked for each."""
    heldout_shards: int
    """The same of the held-out split."""
    holes: int
    """Sequences that the run will lose by it from where it stands to its end."""
    exact: bool
    """Else there are so many that only some were looked for, and ``holes`` are the fewest that it can be."""


def allowed_holes(config: Config, end: int) -> int:
    """How many holes a run that ends at position ``end`` may have."""
    sequences = config.batch_plan.sequences_before(end)
    return math.floor(Fraction(str(config.data.max_hole_fraction)) * sequences)


def look_for_missing(
    config: Config, data: RunData, shards: Sequence[IntArray], heldout: int, before: int, position: int, end: int
) -> Missing:
    """What the run loses between ``position`` and ``end`` by the shards of its sources that can't be read.

    Args:
        config: of the run.
        data: what it reads.
        shards: of each source the rows of those without file or block index.
        heldout: how many held-out shards are so.
        before: the holes that it has already.
        position: where it stands.
        end: the position at which it will be done.

    Raises:
        UserError: more than ``data.max_hole_fraction`` allows.
    """
    holes, exact = 0, True
    spans = [(position, end, 1)]
    spans += [(max(start, position), min(stop, end), -1) for start, stop in config.data.skip_ranges]
    for number, (source, rows) in enumerate(zip(data.sources, shards, strict=True)):
        parts: list[IntArray] = []
        while len(parts) < len(rows) and sum(map(len, parts)) < MOST_LOOKED_AT:
            parts.append(source.sequences_of(int(rows[len(parts)])))
        exact = exact and len(parts) == len(rows)
        lost = np.concatenate([np.empty(0, np.int64), *parts])
        holes += sum(sign * data.order.reads(number, lost, *span) for *span, sign in spans if span[0] < span[1])
    missing = Missing(sum(map(len, shards)), heldout, holes, exact)
    if before + holes > (allowed := allowed_holes(config, end)):
        first = next(source.where(rows[0]) for source, rows in zip(data.sources, shards, strict=True) if len(rows))
        has = f"it has {before:,} holes already, and " if before else ""
        raise UserError(
            f"{told(missing)} (the first: {first}); {has}data.max_hole_fraction = {config.data.max_hole_fraction} "
            f"allows {allowed:,} in all. Restore them from a copy (`pretrain-data verify` lists all damage), or raise "
            "the fraction."
        )
    return missing


def check_missing(config: Config, data: RunData, holes: int, position: int, end: int) -> Missing | None:
    """As :func:`look_for_missing`, by one process for all ranks; None where nothing may be missing.

    Raises:
        DataError: something is, and ``data.on_damage`` is ``stop``.
        UserError: as :func:`look_for_missing`.
    """
    for name, source in (*zip(data.names, data.sources, strict=True), *data.heldout.items()):
        try:
            source.check_every_file()
        except DataError as error:
            raise DataError(f"data.sources.{name}: {error}") from error
    if config.data.on_damage == "stop":
        return None
    shards, heldout = (
        [source.unreadable_shards((0, 1)) for source in sources] for sources in (data.sources, data.heldout.values())
    )
    return look_for_missing(config, data, shards, sum(map(len, heldout)), holes, position, end)


def told(missing: Missing) -> str:
    """What is missing, in words."""
    shards = f"{missing.shards:,} shard{'s are' if missing.shards != 1 else ' is'} missing or without block index"
    least = "" if missing.exact else "at least "
    lost = f"{shards}, by which the run loses {least}{missing.holes:,} sequence{'s' if missing.holes != 1 else ''}"
    return f"{lost}; of the held-out shards {missing.heldout_shards:,}" if missing.heldout_shards else lost
