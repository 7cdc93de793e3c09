"""Samples of a WebDataset tar: neighbouring members whose names are equal up to the first dot of the base name.

The rule is that of `webdataset` (``base_plus_ext`` and ``group_by_keys`` in ``tariterators.py`` of version 1.0):
``a/b.seg.txt`` is the field ``seg.txt`` (in lower case) of the sample ``a/b``; names that begin with ``__name__`` are
notes of the writer and no fields. What `webdataset` passes over is told here: members that are no field of any
sample, samples that lack a field that the others have, keys that come again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from . import headers
from .headers import TarError
from .walk import Member

_NOTE: Final = re.compile(r"__[^/]*__($|/)")
_NO_FIELD: Final = {
    headers.HARD_LINK: "Write the archive with `tar --hard-dereference`",
    headers.SYMBOLIC_LINK: "Write the archive with `tar --dereference`",
    headers.SPECIAL_FILE: "Write the archive again without it",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample: ``fields`` are the payloads that were asked for, ``names`` all it has, ``offset`` its first byte."""

    key: str
    offset: int
    fields: dict[str, bytes]
    names: Collection[str]


@dataclass(frozen=True, slots=True)
class BadSample:
    """What can't be taken as a sample though the archive is sound: ``reason`` to count by, ``problem`` to read."""

    key: str
    offset: int
    reason: str
    problem: str


@dataclass(slots=True)
class _Open:
    """A sample whose members are still coming; ``offsets``: of each field's member."""

    key: str
    offset: int
    fields: dict[str, bytes] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    repeated: tuple[str, int] | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, field) of a member's name, or None where it has no field (no dot, or a hidden file)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def group_samples(
    members: Iterable[Member],
    where: str,
    keep: Callable[[str, int], bool] = lambda name, size: True,
    optional: Collection[str] = (),
) -> Iterator[Sample | BadSample]:
    """The samples of one archive, in order.

    Every sample must have the fields of the archive's first one, but for the ``optional`` ones. ``keep(field, size in
    bytes)`` says which payloads to hold in memory.

    Raises:
        TarError: the archive is damaged, or its first sample lacks a field that a later one has, so that it is the
            first whose field was lost.
    """
    check = _Check(where, frozenset(optional))
    current: _Open | None = None
    strays: list[BadSample] = []  # a member that is no field ends no sample, and comes after the one it stands in
    for member in members:
        if member.kind == headers.FOLDER or _NOTE.match(member.name):
            continue
        split = split_name(member.name) if member.kind == headers.FILE else None
        if split is None:
            strays.append(_stray(member))
            continue
        key, name = split
        if current is None or current.key != key:
            if current is not None:
                yield check.closed(current)
            yield from strays
            strays = []
            current = _Open(key, member.offset)
        if name in current.offsets:
            current.repeated = current.repeated or (name, member.offset)
            continue
        current.offsets[name] = member.offset
        if keep(name, member.size):
            current.fields[name] = member.read()
    if current is not None:
        yield check.closed(current)
    yield from strays


class _Check:
    """What a sample must be in view of those before it in the archive."""

    def __init__(self, where: str, optional: frozenset[str]) -> None:
        self._where = where
        self._optional = optional
        self._expected: frozenset[str] | None = None
        self._first = ""
        self._keys: dict[str, int] = {}

    def closed(self, sample: _Open) -> Sample | BadSample:
        """``sample`` as it is handed on.

        Raises:
            TarError: it has a field that the archive's first sample lacks.
        """
        earlier = self._keys.setdefault(sample.key, sample.offset)
        if earlier != sample.offset:
            return BadSample(
                sample.key,
                sample.offset,
                "key twice in an archive",
                f"sample {sample.key!r} was there before, at byte {earlier}. Take one of them out, or give it "
                "another name.",
            )
        if sample.repeated is not None:
            name, offset = sample.repeated
            return BadSample(
                sample.key,
                sample.offset,
                "field twice in a sample",
                f"sample {sample.key!r} has the field {name!r} twice, at bytes {sample.offsets[name]} and {offset}. "
                "Give each sample a key of its own.",
            )
        names = sample.offsets.keys() - self._optional
        if self._expected is None:
            self._expected, self._first = frozenset(names), sample.key
        if more := sorted(names - self._expected):
            raise TarError(
                self._where,
                sample.offsets[more[0]],
                f"sample {sample.key!r} has the field {more[0]!r}, which the archive's first sample {self._first!r} "
                "lacks: a field was lost there, or samples may lack it. Write the archive again, or name the field in "
                "optional_fields.",
            )
        if missing := sorted(self._expected - names):
            return BadSample(
                sample.key,
                sample.offset,
                f"no field {missing[0]}",
                f"sample {sample.key!r} lacks the field {missing[0]!r}, which the archive's first sample "
                f"{self._first!r} has. Mend the archive, or name the field in optional_fields.",
            )
        return Sample(sample.key, sample.offset, sample.fields, sample.offsets.keys())


def _stray(member: Member) -> BadSample:
    if member.kind == headers.FILE:
        return BadSample(
            member.name,
            member.offset,
            "name without an extension",
            f"member {member.name!r} is no field of a sample: its name has no `key.extension`. Take it out.",
        )
    return BadSample(
        member.name,
        member.offset,
        member.kind,
        f"member {member.name!r} is a {member.kind}, which holds no text. {_NO_FIELD[member.kind]}.",
    )
