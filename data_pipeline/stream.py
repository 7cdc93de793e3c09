"""What a run reads: settings, and the opened sources with their order.

The trainer's ``data`` section is made of these settings, and so is what a run folder remembers for ``explain`` and
``when-seen``: whoever opens the same settings with the same seed sees the same samples at the same positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from .errors import DataError, UserError
from .layout import MANIFEST_FILE, nearest_divisors
from .manifest import HELDOUT, TRAIN
from .mixture import Phase
from .order import Order, OrderSource
from .reader import TokenSource
from .settings import Settings
from .storage import StorageSettings, check_answers, open_store
from .windows import Windows


class SourceSettings(Settings):
    path: str = Field(min_length=1)
    """A data set written by ``pretrain-data prepare``: a folder, ``http(s)://``, ``s3://``, ``gs://``, or ``pipe:`` and
    a shell command in which ``{}`` stands for the name of a file of the data set."""
    domain: str | None = None
    """One domain of the data set; ``null`` takes all of them as one source."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Share of the sequences, relative to the other sources' weights."""
    max_epochs: int | None = Field(default=1, ge=1)
    """How often a sequence may be seen; ``null`` sets no bound. A run that needs more is refused before it starts."""


class PhaseSettings(Settings):
    start: int = Field(ge=1)
    """Position (sequences since the beginning of the run) at which these weights begin."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """A weight for every source, by name."""


class WindowSettings(Settings):
    """The ``windowed`` order; part of the data's identity, so a run can't change it on the way."""

    strata: int = Field(default=256, ge=1, le=65_536)
    """Into how many contiguous strata each source is cut; any so many positions in a row draw one sequence from each.
    The global batch is a good choice: then so does a batch, and a rank always reads the same strata."""
    tokens: int = Field(default=1 << 22, ge=1)
    """Tokens of a window: the sequences that are fetched together and shuffled among themselves (4 Mi tokens of 2 bytes
    are range reads of 8 MB)."""


class StreamSettings(StorageSettings):
    sources: dict[str, SourceSettings] = Field(min_length=1)
    """What to train on, by name. The order hangs on the names: renaming a source reshuffles it."""
    phases: tuple[PhaseSettings, ...] = ()
    """Changes of the mixture along the run, in order of ``start``."""
    seq_len: int = Field(ge=2)
    """Tokens in a sequence; must divide the data sets' block length."""
    order: Literal["full", "windowed"] = "full"
    """``full``: any sequence of a source may come anywhere in its epoch; for local disks. ``windowed``: from strata of
    windows of neighbouring blocks, each window fetched once an epoch; for remote storage."""
    windows: WindowSettings | None = None
    """Of the ``windowed`` order; ``null`` takes the defaults."""
    on_damage: Literal["stop", "hole"] = "stop"
    """``hole``: a damaged block's sequences become holes at their positions: masked, counted, listed in the run's
    damage/, bounded by ``max_hole_fraction``. ``stop``: an error, after saving."""

    @model_validator(mode="after")
    def _check_mixture(self) -> StreamSettings:
        if not any(source.weight > 0 for source in self.sources.values()):
            raise ValueError("all sources have weight 0; give at least one a positive weight")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases must start at increasing positions, got {starts}")
        for phase in self.phases:
            if set(phase.weights) != set(self.sources):
                raise ValueError(
                    f"the phase at {phase.start} weighs {sorted(phase.weights)}, but the sources are "
                    f"{sorted(self.sources)}; give every source a weight"
                )
        for name, source in self.sources.items():
            if source.weight == 0 and not any(phase.weights[name] for phase in self.phases):
                raise ValueError(
                    f"source {name!r} has weight 0 in every phase, so nothing of it would ever be read; take it out, "
                    "or give it a weight"
                )
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> StreamSettings:
        if self.order == "full" and self.windows is not None:
            raise ValueError("windows has no meaning in the order full; set order: windowed or leave windows out")
        if self.order == "windowed" and self._windows.tokens % self.seq_len:
            nearest = max(1, round(self._windows.tokens / self.seq_len)) * self.seq_len
            raise ValueError(
                f"windows.tokens {self._windows.tokens} is not a multiple of seq_len {self.seq_len}; the nearest is "
                f"{nearest}"
            )
        return self

    @property
    def _windows(self) -> WindowSettings:
        return self.windows or WindowSettings()

    @property
    def order_windows(self) -> Windows | None:
        """The windows in sequences, for the order; ``None`` in the order ``full``."""
        if self.order == "full":
            return None
        return Windows(self._windows.strata, self._windows.tokens // self.seq_len)


@dataclass(frozen=True)
class Stream:
    """The opened training split: sources and their order, at the same indices as ``names``."""

    names: tuple[str, ...]
    sources: tuple[TokenSource, ...]
    order: Order

    def close(self) -> None:
        """Close the open shards."""
        for source in self.sources:
            source.close()


def open_stream(settings: StreamSettings, seed: int, share: tuple[int, int] = (0, 1), ranks_of_node: int = 1) -> Stream:
    """Open every source's training split and make the run's order.

    Args:
        settings: what to read.
        seed: the run's.
        share: (rank, ranks): which part of the shards this process looks for at the start.
        ranks_of_node: how many ranks share the cache of this node.

    Raises:
        UserError: a data set is missing, ``seq_len`` does not divide its blocks, or the node's cache is too small for
            the order.
        StorageError: a server does not answer.
        DataError: a data set is damaged and ``on_damage`` is ``stop``.
    """
    names = tuple(settings.sources)
    check_answers((settings.sources[name].path for name in names), MANIFEST_FILE, settings)
    sources = tuple(open_split(settings, name, TRAIN, share) for name in names)
    order = Order(
        seed,
        [
            OrderSource(name, source.sequences, settings.sources[name].weight)
            for name, source in zip(names, sources, strict=True)
        ],
        phases=[Phase(phase.start, phase.weights) for phase in settings.phases],
        mode=settings.order,
        windows=settings.order_windows,
    )
    stream = Stream(names, sources, order)
    _check_cache(settings, stream, ranks_of_node / share[1])
    return stream


def _check_cache(settings: StreamSettings, stream: Stream, part: float) -> None:
    """Refuse a cache in which what is needed again soon would have to be fetched again and again.

    ``part`` is the part of the strata that the ranks of this node read.
    """
    needed, remote = 0, []
    for number, (name, source) in enumerate(zip(stream.names, stream.sources, strict=True)):
        store = open_store(source.root, settings)
        if store.local is not None:
            continue
        remote.append(name)
        whole, layout = int(source.shards.bytes.sum()), source.manifest.layout
        first, stop = stream.order.window(number, np.array([source.sequences // 2]))
        windows = settings.order_windows
        if windows is None or stop[0] - first[0] == source.sequences:
            needed += whole
            continue
        # a window begins and ends inside blocks, of which whole ones are fetched
        blocks = -(-windows.sequences * settings.seq_len // layout.block_tokens) + 1
        piece = blocks * layout.member_stride if store.ranges else int(source.shards.bytes.max())
        needed += min(whole, math.ceil(windows.strata * min(part, 1.0)) * piece)
    if needed > settings.cache.bytes:
        why, advice = "the order full draws from all shards at any time", "set data.order: windowed, or copy the data"
        if settings.order == "windowed":
            why = "the windowed order reads from a window of each stratum at a time, in whole blocks"
            advice = "lower data.windows.strata or data.windows.tokens"
        raise UserError(
            f"data.cache.bytes = {settings.cache.bytes:,} is too small for the sources {', '.join(remote)}: {why}, "
            f"which takes {needed:,} bytes on this node. Raise it, or {advice}."
        )


def open_split(settings: StreamSettings, name: str, split: str, share: tuple[int, int] = (0, 1)) -> TokenSource:
    """Open one split of the source ``name``.

    Raises:
        UserError: names the source; else as :func:`open_stream`.
    """
    source = settings.sources[name]
    try:
        opened = TokenSource(
            source.path,
            source.domain,
            split,
            settings.seq_len,
            storage=settings,
            share=share,
            on_damage=settings.on_damage,
        )
    except UserError as error:
        advice = ""
        if split == HELDOUT and not isinstance(error, DataError):
            advice = (
                " An evaluation needs held-out text: raise heldout_fraction when preparing, or set "
                "evaluation.every_steps=null."
            )
        kind = DataError if isinstance(error, DataError) else UserError
        raise kind(f"data.sources.{name}: {error}{advice}") from error
    packed = opened.manifest.pack_tokens
    if packed is not None and settings.seq_len % packed:
        raise UserError(
            f"data.sources.{name}: {source.path} was packed in rows of {packed} tokens (best_fit), and sequences of "
            f"{settings.seq_len} would cut its documents. Set data.seq_len to "
            f"{nearest_divisors(opened.manifest.block_tokens, settings.seq_len, packed)}, or prepare it again with "
            f"pack_tokens = {settings.seq_len}."
        )
    return opened
