"""What every source is: settings that know how to cut their input into parts and to read the documents of one.

Parts depend on the input and on ``part_bytes`` alone, so that a restarted `prepare`, or one with another number of
processes, cuts the same ones.
"""

from __future__ import annotations

import glob
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import Field

from ..errors import DataError, UserError
from ..settings import Settings


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    url: str


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

    domain: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="The domain its documents belong to; several sources may share one. "
        "Mixture weights and evaluation are by domain.",
    )

    @abstractmethod
    def parts(self, part_bytes: int) -> list[Part]:
        """Cut the input into parts of about ``part_bytes`` input bytes.

        Raises:
            UserError: the input is missing or unreadable.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in input order, empty ones included.

        Raises:
            DataError: a record that is no document; names the file and the place in it.
        """

    @abstractmethod
    def stamp(self) -> dict[str, Any]:
        """What shows that the input changed between two starts of a `prepare` (JSON)."""


class FileSource(Source):
    """A source that reads files."""

    files: tuple[str, ...] = Field(
        min_length=1,
        description="Paths or globs (`**` included), relative to the working directory. Read in sorted order.",
    )

    def input_files(self) -> list[str]:
        """The files that the patterns name, each once, sorted.

        Raises:
            UserError: a pattern names no file.
        """
        found: set[str] = set()
        for pattern in self.files:
            matches = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
            if not matches:
                raise UserError(
                    f"input {pattern!r} (source of domain {self.domain!r}) names no file, seen from {os.getcwd()}. "
                    "Mend `files` in the configuration."
                )
            found.update(matches)
        return sorted(found)

    def stamp(self) -> dict[str, Any]:
        """Size and modification time of each file."""
        return {path: file_stamp(path) for path in self.input_files()}


def file_stamp(path: str) -> str:
    """Size and modification time of a file, as text."""
    status = os.stat(path)
    return f"{status.st_size} bytes, modified at {status.st_mtime_ns} ns"


def whole_files(sizes: Iterable[tuple[str, int]], part_bytes: int) -> list[Part]:
    """Parts of whole neighbouring files of together at least ``part_bytes`` (the last: what is left)."""
    return _group(((Span(path, 0, sys.maxsize), size) for path, size in sizes), part_bytes)


def cut_files(sizes: Iterable[tuple[str, int]], part_bytes: int) -> list[Part]:
    """Parts of byte ranges: large files are cut, small neighbours go together, ``.gz`` files stay whole."""
    spans: list[tuple[Span, int]] = []
    for path, size in sizes:
        if path.endswith(".gz"):
            spans.append((Span(path, 0, sys.maxsize), size))
            continue
        count = max(1, -(-size // part_bytes))
        cuts = [size * k // count for k in range(count + 1)]
        spans += [(Span(path, start, stop), stop - start) for start, stop in pairwise(cuts)]
    return _group(spans, max(1, part_bytes // 2))


def _group(spans: Iterable[tuple[Span, int]], part_bytes: int) -> list[Part]:
    parts: list[Part] = []
    group: list[Span] = []
    total = 0
    for span, size in spans:
        group.append(span)
        total += size
        if total >= part_bytes:
            parts.append(Part(tuple(group), total))
            group, total = [], 0
    return [*parts, Part(tuple(group), total)] if group else parts


def decode_utf8(content: bytes, place: str) -> str:
    """``content`` as text; ``place`` says in the message where it stands.

    Raises:
        DataError: not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte {error.start} of the record is 0x{content[error.start]:02x}). "
            "Convert the file, or leave it out."
        ) from error


def checked_text(value: Any, field: str, place: str) -> str:
    """``value`` if it is a string that UTF-8 can hold; ``place`` says in the message where it stands.

    Raises:
        DataError: not a string, or a string with half a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{place}: field {field!r} holds {type(value).__name__}, not a string. Mend the record.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} holds half a surrogate pair (character {error.start}), which is no text. "
            "Mend the record."
        ) from error
    return value
