"""Plain text files: one document per file, or documents between separator lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from ..storage import StorageSettings
from .base import Document, FileSource, Part, Rejected, Span, cut_files, whole_files
from .inputs import DEFAULT_STORAGE, open_input_file, shown_name
from .lines import byte_place, line_place, read_lines
from .records import not_utf8


class TextSource(FileSource):
    """UTF-8 text files; names ending in ``.gz`` and ``.zst`` are unpacked."""

    kind: Literal["text"]
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="A line that is exactly this ends a document (`<|endoftext|>`); the line break before it is not "
        "part of the document. Unset: each file is one document.",
    )

    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """Whole files together, or, with a separator, byte ranges of them."""
        sizes = self._sizes(storage)
        return whole_files(sizes, part_bytes) if self.separator is None else cut_files(sizes, part_bytes)

    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """Whole files (url: the path), or documents that begin in the byte ranges (url: path#byte=offset)."""
        for span in part.spans:
            if self.separator is not None:
                for begin, content in _separated(span, self.separator.encode(), storage):
                    yield self._document(span.path, begin, content, storage)
                continue
            with open_input_file(span.path, storage) as handle:
                content = handle.read()
            yield _whole(shown_name(span.path), content)

    def _document(self, path: str, begin: int, content: bytes, storage: StorageSettings) -> Document | Rejected:
        url = f"{shown_name(path)}#byte={begin}"
        try:
            return Document(content.decode("utf-8"), url)
        except UnicodeDecodeError as error:
            offset = begin + error.start
            stop = self.on_bad_record == "stop"
            place = line_place(path, offset, storage) if stop else byte_place(path, offset)
            return Rejected.of(url, not_utf8(error, place))


def _whole(name: str, content: bytes) -> Document | Rejected:
    try:
        return Document(content.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        return Rejected.of(name, not_utf8(error, name))


def _separated(span: Span, separator: bytes, storage: StorageSettings) -> Iterator[tuple[int, bytes]]:
    """(offset, content) of the documents that begin in ``span``: at the file's start and after each separator line."""
    lines: list[bytes] = []
    begin: int | None = 0 if span.start == 0 else None
    with open_input_file(span.path, storage) as handle:
        # One that begins at span.start follows a separator line that lies before it, CRLF at most beyond its text.
        for offset, line in read_lines(handle, max(0, span.start - len(separator) - 2)):
            if begin is None and offset >= span.stop:
                return
            if line.rstrip(b"\r\n") != separator:
                if begin is not None:
                    lines.append(line)
                continue
            if begin is not None:
                yield begin, _content(lines)
            lines = []
            begin = offset + len(line)
            if begin >= span.stop:
                return
            if begin < span.start:
                begin = None
    if begin is not None and lines:
        yield begin, _content(lines)


def _content(lines: list[bytes]) -> bytes:
    return b"".join(lines).removesuffix(b"\n").removesuffix(b"\r")
