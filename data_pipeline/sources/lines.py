"""Reading lines out of byte ranges, and naming a line in an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from ..storage import StorageSettings
from .inputs import is_remote, open_input_file, shown_name


def read_lines(handle: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The lines of an input that begin at byte ``start`` or after: (offset, line with its end). None if none begins
    before ``stop``: it is not looked for beyond."""
    offset = 0
    if start > 0:
        handle.seek(start - 1)
        rest = handle.readline(stop - start)
        if not rest.endswith(b"\n"):
            return
        offset = start - 1 + len(rest)
    for line in handle:
        yield offset, line
        offset += len(line)


def line_place(name: str, offset: int, storage: StorageSettings) -> str:
    """``NAME, line N`` of the line that begins at byte ``offset`` of the unpacked input.

    Reads a file up to there; what is remote is not read again and gets ``NAME, byte OFFSET``.
    """
    if is_remote(name):
        return byte_place(name, offset)
    number, left = 1, offset
    with open_input_file(name, storage) as handle:
        while left > 0 and (chunk := handle.read(min(left, 1 << 20))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{name}, line {number}"


def byte_place(name: str, offset: int) -> str:
    """``NAME, byte OFFSET``."""
    return f"{shown_name(name)}, byte {offset}"
