"""Plain text files: one document per file, or documents between separator lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from .base import Document, FileSource, Part, Span, cut_files, decode_utf8, whole_files
from .lines import line_place, open_bytes, read_lines


class TextSource(FileSource):
    """UTF-8 text files; names ending in ``.gz`` are unpacked."""

    kind: Literal["text"]
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="A line that is exactly this ends a document (`<|endoftext|>`); the line break before it is not "
        "part of the document. Unset: each file is one document.",
    )

    def parts(self, part_bytes: int) -> list[Part]:
        """Whole files together, or, with a separator, byte ranges of them."""
        sizes = [(path, os.path.getsize(path)) for path in self.input_files()]
        return whole_files(sizes, part_bytes) if self.separator is None else cut_files(sizes, part_bytes)

    def read(self, part: Part) -> Iterator[Document]:
        """Whole files (url: the path), or documents that begin in the byte ranges (url: path#byte=offset)."""
        for span in part.spans:
            if self.separator is None:
                with open_bytes(span.path) as handle:
                    yield Document(decode_utf8(handle.read(), span.path), span.path)
            else:
                yield from _separated(span, self.separator.encode())


def _separated(span: Span, separator: bytes) -> Iterator[Document]:
    """The documents that begin in ``span``: at the file's start and after each separator line."""
    lines: list[bytes] = []
    begin: int | None = 0 if span.start == 0 else None
    # A document that begins at span.start follows a separator line that lies before it, CRLF at most beyond its text.
    for offset, line in read_lines(span.path, max(0, span.start - len(separator) - 2)):
        if begin is None and offset >= span.stop:
            return
        if line.rstrip(b"\r\n") != separator:
            if begin is not None:
                lines.append(line)
            continue
        if begin is not None:
            yield _document(span.path, begin, lines)
        lines = []
        begin = offset + len(line)
        if begin >= span.stop:
            return
        if begin < span.start:
            begin = None
    if begin is not None and lines:
        yield _document(span.path, begin, lines)


def _document(path: str, begin: int, lines: list[bytes]) -> Document:
    content = b"".join(lines)
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Document(decode_utf8(content, line_place(path, begin + error.start)), path)
    return Document(text, f"{path}#byte={begin}")
