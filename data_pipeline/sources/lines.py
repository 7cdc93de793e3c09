"""Reading lines out of byte ranges, and naming a line in an error."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import DataError, UserError
from .base import Span


def open_bytes(path: str) -> BinaryIO:
    """Open a plain or gzip (``.gz``) file for reading bytes.

    Raises:
        UserError: the file can't be opened.
    """
    try:
        return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]  # GzipFile
    except OSError as error:
        raise UserError(f"input file {path} can't be read: {error.strerror}. Mend its path or its rights.") from error


def read_lines(path: str, start: int) -> Iterator[tuple[int, bytes]]:
    """The lines of ``path`` that begin at byte ``start`` or after: (offset, line with its end).

    Raises:
        DataError: a gzip file is cut short or damaged.
    """
    with open_bytes(path) as handle:
        offset = 0
        if start > 0:
            handle.seek(start - 1)
            offset = start - 1 + len(handle.readline())
        try:
            for line in handle:
                yield offset, line
                offset += len(line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged after {offset} unpacked bytes ({error}). Fetch it again.") from error


def lines_of_span(span: Span) -> Iterator[tuple[int, bytes]]:
    """The lines that begin inside ``span``: (offset, line with its end)."""
    for offset, line in read_lines(span.path, span.start):
        if offset >= span.stop:
            return
        yield offset, line


def line_place(path: str, offset: int) -> str:
    """``PATH, line N`` of the line that begins at byte ``offset``; reads the file up to there."""
    number, left = 1, offset
    with open_bytes(path) as handle:
        while left > 0 and (chunk := handle.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{path}, line {number}"
