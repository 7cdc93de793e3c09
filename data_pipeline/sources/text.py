"""Plain text files: one document per file, or documents between separator lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator

from ..storage import StorageSettings
from .base import Document, FileSource, Part, Rejected, Span, cut_files, whole_files
from .inputs import DEFAULT_STORAGE, open_input_file, shown_name
from .lines import byte_place, line_place, read_lines
from .records import not_utf8
from .unpacking import name_unpacked


class TextSource(FileSource):
    """UTF-8 text files; names ending in ``.gz`` and ``.zst`` are unpacked."""

    kind: Literal["text"]
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="A line that is exactly this ends a document (`<|endoftext|>`); the line break before it is not "
        "part of the document. Unset: each file is one document.",
    )

    @field_validator("separator")
    @classmethod
    def _is_a_line(cls, separator: str | None) -> str | None:
        if separator is not None and ("\n" in separator or "\r" in separator):
            raise ValueError(f"{separator!r} holds a line break, so no line can be it; give the line without its end")
        return separator

    def doubts(self, storage: StorageSettings = DEFAULT_STORAGE) -> Iterator[str]:
        yield from super().doubts(storage)
        if json := [name for name in self.input_files(storage) if name_unpacked(name).endswith(".json")]:
            yield (
                f"{len(json):,} of its files are named as JSON (the first: {shown_name(json[0])}) and are read as "
                "plain text; for one object a line set `kind: jsonl`"
            )

    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """Whole files together, or, with a separator, byte ranges of them."""
        sizes = self._sizes(storage)
        return whole_files(sizes, part_bytes) if self.separator is None else cut_files(sizes, part_bytes)

    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """Whole files (url: the path), or documents that begin in the byte ranges (url: path#byte=offset)."""
        for span in part.spans:
            if self.separator is not None:
                pieces = _separated(span, self.separator.encode(), storage)
                for begin, content in pieces:
                    document = self._document(span.path, begin, content, storage)
                    if isinstance(document, Rejected):
                        document = self.after_the_rest(document, span.path, pieces)
                    yield document
                continue
            with open_input_file(span.path, storage) as handle:
                content = handle.read()
            yield _whole(shown_name(span.path), content)

    def _document(self, path: str, begin: int, content: bytes, storage: StorageSettings) -> Document | Rejected:
        url = f"{shown_name(path)}#byte={begin}"
        try:
            return Document((content if begin else content.removeprefix(codecs.BOM_UTF8)).decode("utf-8"), url)
        except UnicodeDecodeError as error:
            offset = begin + error.start
            stop = self.on_bad_record == "stop"
            place = line_place(path, offset, storage) if stop else byte_place(path, offset)
            return Rejected.of(url, not_utf8(error, place))


def _whole(name: str, content: bytes) -> Document | Rejected:
    try:
        return Document(content.removeprefix(codecs.BOM_UTF8).decode("utf-8"), name)
    except UnicodeDecodeError as error:
        return Rejected.of(name, not_utf8(error, name))


def _separated(span: Span, separator: bytes, storage: StorageSettings) -> Iterator[tuple[int, bytes]]:
    """(offset, content) of the documents that begin in ``span``: at the file's start and after each separator line."""
    lines: list[bytes] = []
    begin: int | None = 0 if span.start == 0 else None
    ends = (separator, separator + b"\n", separator + b"\r\n")
    with open_input_file(span.path, storage) as handle:
        # One that begins at span.start follows a separator line: its text, CRLF at most, a byte-order mark at most.
        before = len(separator) + 2 + len(codecs.BOM_UTF8)
        for offset, line in read_lines(handle, max(0, span.start - before), span.stop):
            if begin is None and offset >= span.stop:
                return
            if (line if offset else line.removeprefix(codecs.BOM_UTF8)) not in ends:
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
