"""JSON lines, plain or gzip: one object per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from ..errors import DataError
from .base import Document, FileSource, Part, checked_text, cut_files, decode_utf8
from .lines import line_place, lines_of_span


class JsonlSource(FileSource):
    """JSON-lines files; names ending in ``.gz`` are unpacked."""

    kind: Literal["jsonl"]
    text_field: str = Field(default="text", description="The field that holds the document.")
    url_field: str | None = Field(
        default=None, description="A field that says where the document came from. Unset: path#byte=offset."
    )

    def parts(self, part_bytes: int) -> list[Part]:
        """Byte ranges of plain files; gzip files whole, because they have no random access."""
        sizes = [(path, os.path.getsize(path)) for path in self.input_files()]
        return cut_files(sizes, part_bytes)

    def read(self, part: Part) -> Iterator[Document]:
        """The records whose lines begin in the part's byte ranges."""
        for span in part.spans:
            for offset, line in lines_of_span(span):
                yield self._document(span.path, offset, line)

    def _document(self, path: str, offset: int, line: bytes) -> Document:
        try:
            record = json.loads(line.decode("utf-8"))
            text, url = record[self.text_field], record[self.url_field] if self.url_field else None
            if isinstance(text, str) and (url is None or isinstance(url, str)):
                text.encode()
                return Document(text, url or f"{path}#byte={offset}")
        except (ValueError, KeyError, TypeError, IndexError):
            pass
        raise self._what_is_wrong(line_place(path, offset), line)

    def _what_is_wrong(self, place: str, line: bytes) -> DataError:
        """The error for a line that is no document; a slow path, so that the fast one stays short."""
        text = decode_utf8(line, place).strip()
        try:
            record: Any = json.loads(text)
        except ValueError as error:
            return DataError(f"{place}: not valid JSON ({error}): {text[:60]!r}. Mend or remove the line.")
        if not isinstance(record, dict):
            return DataError(f"{place}: holds {type(record).__name__}, not a JSON object. Mend or remove the line.")
        for field in filter(None, (self.text_field, self.url_field)):
            if field not in record:
                known = ", ".join(sorted(record)) or "none"
                return DataError(f"{place}: has no field {field!r}; its fields: {known}. Set text_field or url_field.")
            checked_text(record[field], field, place)
        return DataError(f"{place}: can't be read as a document.")
