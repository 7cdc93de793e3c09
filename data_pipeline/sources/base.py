"""What every source is: settings that know how to cut their input into parts and to read the documents of one.

Parts depend on the input and on ``part_bytes`` alone, so that a restarted `prepare`, or one with another number of
processes, cuts the same ones.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import Field

from ..errors import DataError, UserError
from ..settings import Settings
from ..storage import StorageSettings
from .inputs import (
    DEFAULT_STORAGE,
    can_be_cut,
    find_inputs,
    has_checksum,
    input_stamp,
    input_versions,
    is_remote,
    kind_of_name,
    packing_of_input,
    shown_name,
)
from .records import RecordError


@dataclass(frozen=True)
class Document:
    """One text and where it came from. ``url`` is UTF-8 whatever it was made from; ``metadata`` holds JSON values."""

    text: str
    url: str
    metadata: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.url.isascii():
            object.__setattr__(self, "url", encodable(self.url))


@dataclass(frozen=True)
class Rejected:
    """A record that stood where a document should: ``reason`` in a few words to count by, ``message`` to read."""

    url: str
    reason: str
    message: str

    def __post_init__(self) -> None:
        for name in ("url", "message"):
            object.__setattr__(self, name, encodable(getattr(self, name)))

    @classmethod
    def of(cls, url: str, error: RecordError) -> Rejected:
        """What a reader gives in place of the record at ``url``."""
        return cls(url, error.reason, str(error))


@dataclass(frozen=True)
class Span:
    """A piece of one input: bytes, row groups or shards ``start`` (inclusive) to ``stop`` of ``path``, by kind."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """A piece of a source that one process reads alone. ``bytes`` measures the progress; 0: not known."""

    spans: tuple[Span, ...]
    bytes: int


class Source(Settings, ABC):
    """Settings of one source."""

    compared_at_the_end: ClassVar[bool] = False
    """Whether its stamp is to be taken again when all parts are read, for it does not hang on the part."""

    domain: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="The domain its documents belong to; several sources may share one. "
        "Mixture weights and evaluation are by domain.",
    )
    on_bad_record: Literal["stop", "drop"] = Field(
        default="stop",
        description="What to do with a single record that is no document (broken JSON or UTF-8, a missing field): "
        "`stop` with an error that names it, or `drop` it, count it by reason and list it among the rejected. A file "
        "that is cut off or damaged as a whole is an error either way.",
    )

    @abstractmethod
    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """Cut the input into parts of about ``part_bytes`` input bytes.

        Raises:
            UserError: the input is missing or unreadable.
        """

    @abstractmethod
    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """The documents of a part in input order, empty ones included, with what is none in its place.

        Raises:
            DataError: a file is cut off or damaged.
        """

    @abstractmethod
    def stamp(self, storage: StorageSettings = DEFAULT_STORAGE) -> dict[str, Any]:
        """What shows that the input changed between two starts of a `prepare` (JSON)."""

    def check_unchanged(self, part: Part, stamps: Mapping[str, Any]) -> None:
        """Look, after a part was read, whether its input is still what ``stamps`` (of :meth:`stamp`) say; a source
        whose parts can't be looked at again does nothing.

        Raises:
            UserError: names the file that changed.
        """

    def doubts(self, storage: StorageSettings = DEFAULT_STORAGE) -> Iterator[str]:
        """What looks as if it were not meant, though it can be read: half-sentences about the source."""
        return iter(())

    def read(self, part: Part, storage: StorageSettings = DEFAULT_STORAGE) -> Iterator[Document | Rejected]:
        """The records of a part; with ``on_bad_record: stop`` all of them are documents.

        Raises:
            DataError: a record is no document and is not to be dropped; a file is cut off or damaged.
        """
        if self.on_bad_record == "drop":
            yield from self.records(part, storage)
            return
        for record in self.records(part, storage):
            if isinstance(record, Rejected):
                raise DataError(f"{record.message} Or set `on_bad_record: drop`.")
            yield record


class FileSource(Source):
    """A source that reads files."""

    kind: str
    files: tuple[str, ...] = Field(
        min_length=1,
        description="Paths or globs (`**` included) relative to the working directory, addresses (`https://`, `s3://`, "
        "`gs://`), or `pipe:COMMAND`, each with brace patterns (`{000..127}`, `{a,b}`). Read in sorted order.",
    )

    def input_files(self, storage: StorageSettings = DEFAULT_STORAGE) -> list[str]:
        """The files that the patterns name, each once, sorted.

        Raises:
            UserError: a pattern names no file, or a file that is, by its name, of another kind.
        """
        owner = f"source of domain {self.domain!r}"
        names = find_inputs(self.files, owner, storage)
        for name in names:
            if (named := kind_of_name(name)) not in (None, self.kind):
                raise UserError(
                    f"input {shown_name(name)!r} ({owner}) is a file for kind `{named}` by its name, and the source's "
                    f"kind is `{self.kind}`. Set `kind: {named}`, or rename the file if its name is wrong."
                )
        return names

    def doubts(self, storage: StorageSettings = DEFAULT_STORAGE) -> Iterator[str]:
        local = [name for name in self.input_files(storage) if not is_remote(name)]
        if empty := [name for name in local if not os.path.getsize(name)]:
            yield f"{len(empty):,} of its files are empty (0 bytes; the first: {empty[0]})"
        zstd = [name for name in local if packing_of_input(name) == "zstd"]
        if unchecked := [name for name in zstd if not has_checksum(name)]:
            yield (
                f"{len(unchecked):,} of its files are packed without a checksum (the first: {unchecked[0]}), so that a "
                "turned bit in them can't be seen; the command `zstd` writes one, zstandard.ZstdCompressor only with "
                "`write_checksum=True`"
            )

    def stamp(self, storage: StorageSettings = DEFAULT_STORAGE) -> dict[str, Any]:
        """Size and modification time of each file; of what is remote the size, and tag or time as the server says."""
        names = self.input_files(storage)
        versions = input_versions(names, storage)
        return {encodable(name): input_stamp(name, version) for name, version in zip(names, versions, strict=True)}

    def check_unchanged(self, part: Part, stamps: Mapping[str, Any]) -> None:
        for path in {span.path: None for span in part.spans if not is_remote(span.path)}:
            expected = stamps[encodable(path)]
            found = input_stamp(path) if os.path.exists(path) else "gone"
            if found != expected:
                raise UserError(
                    f"{path} changed while it was read: it was {expected}, now it is {found}. Put it back as it was, "
                    "its time included, or prepare what it is now in another `output`."
                )

    def after_the_rest(self, record: Rejected, name: str, rest: Iterator[Any]) -> Rejected:
        """``record``, at which the source may stop, with what is known of the file it is of. If that is packed, the
        ``rest`` is read first: a turned bit can look like a bad record, and the archive's checksum comes last.

        Raises:
            DataError: the archive is damaged.
        """
        if self.on_bad_record == "drop" or packing_of_input(name) is None:
            return record
        deque(rest, maxlen=0)
        whole = " The file was packed like that: its own checksum fits." if has_checksum(name) else ""
        return replace(record, message=f"{record.message}{whole}")

    def _sizes(self, storage: StorageSettings) -> list[tuple[str, int]]:
        names = self.input_files(storage)
        return [(name, version.size) for name, version in zip(names, input_versions(names, storage), strict=True)]


def encodable(name: str) -> str:
    """``name`` with what UTF-8 can't hold (bytes of foreign file names, half surrogate pairs) as ``\\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode()


def whole_files(sizes: Iterable[tuple[str, int]], part_bytes: int) -> list[Part]:
    """Parts of whole neighbouring files of together at least ``part_bytes`` (the last: what is left)."""
    return _group(((Span(path, 0, sys.maxsize), size) for path, size in sizes), part_bytes)


def single_files(sizes: Iterable[tuple[str, int]]) -> list[Part]:
    """One part per file."""
    return [Part((Span(path, 0, sys.maxsize),), size) for path, size in sizes]


def cut_files(sizes: Iterable[tuple[str, int]], part_bytes: int) -> list[Part]:
    """Parts of byte ranges: large files are cut, small neighbours go together; packed and remote ones stay whole."""
    spans: list[tuple[Span, int]] = []
    for path, size in sizes:
        if not can_be_cut(path):
            spans.append((Span(path, 0, sys.maxsize), size))
            continue
        count = max(1, -(-size // part_bytes))
        cuts = [size * k // count for k in range(count + 1)]
        spans += [(Span(path, start, stop), stop - start) for start, stop in pairwise(cuts)]
    return _group(spans, max(1, part_bytes // 2))


def _group(spans: Iterable[tuple[Span, int]], part_bytes: int) -> list[Part]:
    """Neighbours together up to ``part_bytes``; a file of unknown size is a part of its own."""
    parts: list[Part] = []
    group: list[Span] = []
    total = 0
    for span, size in spans:
        group.append(span)
        total += size
        if total >= part_bytes or (size == 0 and not can_be_cut(span.path)):
            parts.append(Part(tuple(group), total))
            group, total = [], 0
    return [*parts, Part(tuple(group), total)] if group else parts
