"""Damage that a run may go on with: what was lost, where, and the ledger that lists it.

A damaged sequence becomes a hole: a row of EOS without a label at the very position that the sequence had, so that
nothing else moves, on no rank and in no later attempt.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from .errors import DataError
from .files import publish_bytes

DAMAGE_FOLDER = "damage"
"""Folder of a run's ledger of holes, a file for each rank."""

OnDamage = Literal["stop", "hole"]
Reason = Literal["checksum", "short", "missing", "index"]
"""Why a block can't be used: its CRC32C differs, its file ends before it does or is missing, or the record of its
CRC32C is damaged."""


class DamagedBlockError(DataError):
    """A block can't be read or is not what was written.

    Attributes:
        problem: what, where and how to mend it, without what lets a run go on.
        shard: name of the shard.
        block: which of its blocks.
        offset: bytes from the start of the shard to the block's first token.
        reason: see :data:`Reason`.
    """

    def __init__(self, problem: str, shard: str, block: int, offset: int, reason: Reason) -> None:
        super().__init__(problem)
        self.problem = problem
        self.shard, self.block, self.offset, self.reason = shard, block, offset, reason

    def __str__(self) -> str:
        return f"{self.problem} {HOLES_ADVICE}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem, self.shard, self.block, self.offset, self.reason)


HOLES_ADVICE = (
    "If it can't be restored, data.on_damage=hole lets a run go on without the damaged blocks, as long as no more than "
    "data.max_hole_fraction of its sequences are lost."
)


_REBUILD = (
    "the .idx of the shard is missing or damaged, `pretrain-data verify --rebuild-sidecars FOLDER` writes it again"
)


@dataclass(frozen=True)
class Damage:
    """A hole: the sequence that should have stood at a position, and what is wrong with the block that holds it.

    Attributes:
        position: in the run; in an evaluation the index of the sequence.
        source: name of the source.
        sample: number of the sequence in the whole mixture (:class:`~data_pipeline.Batch`); in an evaluation the index.
        shard: name of the shard.
        block: which of its blocks.
        offset: bytes from the start of the shard to the block's first token.
        reason: see :data:`Reason`.
    """

    position: int
    source: str
    sample: int
    shard: str
    block: int
    offset: int
    reason: Reason

    @property
    def place(self) -> str:
        """Where the damage lies and what it is, in words."""
        what = f"index ({_REBUILD})" if self.reason == "index" else self.reason
        return f"shard {self.shard} of source {self.source!r}, block {self.block} at byte {self.offset}: {what}"

    @classmethod
    def of(cls, error: DamagedBlockError, position: int, source: str, sample: int) -> Damage:
        return cls(position, source, sample, error.shard, error.block, error.offset, error.reason)


def told_by_block(found: Iterable[Damage], most: int = 3) -> str:
    """The damaged blocks among ``found`` in words, each once with its sequences; at most ``most`` of them by name."""
    blocks = Counter(damage.place for damage in found)
    told = [f"{place} ({count} sequence{'s' if count > 1 else ''})" for place, count in list(blocks.items())[:most]]
    more = len(blocks) - len(told)
    return "; ".join(told) + (f" and {more} more block{'s' if more > 1 else ''}" if more else "")


class DamageLedger:
    """Appends this rank's holes to a file of its own in ``folder``; :func:`read_ledger` reads them all.

    Args:
        folder: made if missing; the same for all ranks and attempts of a run.
        rank: this rank.
        attempt: number of this attempt at the run; rises from one to the next.
        position: where this attempt begins. It trains on everything from there on anew, so what earlier attempts
            have listed from there on counts no more.
    """

    def __init__(self, folder: Path, rank: int, attempt: int = 0, position: int = 0) -> None:
        self._rank, self._attempt = rank, attempt
        folder.mkdir(parents=True, exist_ok=True)
        # a line that a killed attempt left half-written ends here, or the next one would be glued to it
        self._handle = os.open(folder / f"rank{rank:05d}.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._handle).st_size
        torn = size > 0 and os.pread(self._handle, 1, size - 1) != b"\n"
        self._append(([b""] if torn else []) + [_line({"attempt": attempt, "begins_at": position})])

    def add(self, step: int, damage: Iterable[Damage]) -> None:
        """List the holes of one step of this rank; on the disk when this returns.

        Raises:
            OSError: the disk.
        """
        common = {"attempt": self._attempt, "step": step, "rank": self._rank}
        lines = [_line({**common, **asdict(hole)}) for hole in damage]
        if lines:
            self._append(lines)

    def close(self) -> None:
        os.close(self._handle)

    def __enter__(self) -> DamageLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, lines: list[bytes]) -> None:
        content = b"".join(line + b"\n" for line in lines)
        while content:
            content = content[os.write(self._handle, content) :]
        os.fsync(self._handle)


@dataclass(frozen=True)
class LedgerEntry:
    """A hole that the run's present state has trained over, who met it, and in which attempt."""

    attempt: int
    step: int
    rank: int
    damage: Damage


def read_ledger(folder: Path) -> list[LedgerEntry]:
    """The holes of a run in the order of their positions, each position once.

    Left out: what an attempt listed from a position on at which a later attempt began, and half-written last lines.
    """
    begins: dict[int, int] = {}
    found: dict[int, LedgerEntry] = {}
    lines = [line for path in sorted(folder.glob("rank*.jsonl")) for line in _lines(path)]
    for line in lines:
        if "begins_at" in line:
            begins[line["attempt"]] = line["begins_at"]
    for line in lines:
        if "begins_at" in line:
            continue
        entry = LedgerEntry(line.pop("attempt"), line.pop("step"), line.pop("rank"), Damage(**line))
        position = entry.damage.position
        redone = any(attempt > entry.attempt and begin <= position for attempt, begin in begins.items())
        if not redone:
            found.setdefault(position, entry)
    return [found[position] for position in sorted(found)]


def holes_of_run(run: Path) -> dict[int, Reason]:
    """The positions at which the run of the folder ``run`` has trained on a hole, each with what was wrong there."""
    return {entry.damage.position: entry.damage.reason for entry in read_ledger(run / DAMAGE_FOLDER)}


def inherit_ledger(folder: Path, origin: Path, position: int) -> None:
    """Give the run of ``folder`` the holes of the run of ``origin`` before ``position``, with whose state it begins."""
    entries = [entry for entry in read_ledger(origin) if entry.damage.position < position]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [_line({"attempt": 0, "step": e.step, "rank": e.rank, **asdict(e.damage)}) + b"\n" for e in entries]
    publish_bytes(folder / "rank_of_origin.jsonl", b"".join(lines))


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue  # the end of an attempt that was killed while it wrote
        if isinstance(content, dict):
            yield content
