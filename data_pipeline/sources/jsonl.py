"""JSON lines, plain or packed: one object per line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any, Literal

import orjson
from pydantic import Field

from ..storage import StorageSettings
from .base import Document, FileSource, Part, Rejected, Span, cut_files
from .inputs import DEFAULT_STORAGE, open_input_file, shown_name
from .lines import byte_place, line_place, read_lines
from .records import RecordError, checked_object, checked_text, decode_json, parse_json


class JsonlSource(FileSource):
    """JSON-lines files; names ending in ``.gz`` and ``.zst`` are unpacked."""

    kind: Literal["jsonl"]
    text_field: str = Field(default="text", description="The field that holds the document.")
    url_field: str | None = Field(
        default=None, description="A field that says where the document came from. Unset: path#byte=offset."
    )
    metadata_fields: tuple[str, ...] = Field(
        default=(), description="Fields to keep beside the document, where a record has them."
    )

    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """Byte ranges of plain files; packed and remote ones whole, because they are read from their beginning."""
        return cut_files(self._sizes(storage), part_bytes)

    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """The records whose lines begin in the part's byte ranges. The file's last line may be blank, no other."""
        for span in part.spans:
            name = shown_name(span.path)
            with open_input_file(span.path, storage) as handle:
                blank: int | None = None
                lines = read_lines(handle, span.start, span.stop)
                for offset, line in lines:
                    if blank is not None:
                        yield self.after_the_rest(self._rejected(span, blank, b"", storage), span.path, lines)
                        blank = None
                    if offset >= span.stop:
                        break
                    line = line if offset else line.removeprefix(codecs.BOM_UTF8)
                    if line.isspace():
                        blank = offset
                        continue
                    if document := self._document(name, offset, line):
                        yield document
                    else:
                        yield self.after_the_rest(self._rejected(span, offset, line, storage), span.path, lines)

    def _document(self, name: str, offset: int, line: bytes) -> Document | None:
        """The document of a line, or None where it holds none."""
        try:
            record = self._record(line)
            text, url = record[self.text_field], record[self.url_field] if self.url_field else None
            if not isinstance(text, str) or not (url is None or isinstance(url, str)):
                return None
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return None
        kept = {field: record[field] for field in self.metadata_fields if field in record}
        return Document(text, url or f"{name}#byte={offset}", kept or None)

    def _record(self, line: bytes) -> Any:
        """The value of a line as the standard library reads it, by orjson where both are sure to agree.

        Raises:
            ValueError: not JSON, or a text with half a surrogate pair, which orjson refuses anywhere.
        """
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = parse_json(line.decode("utf-8"))
            str(record[self.text_field]).encode()
            return record
        if all(_agreed(record[field]) for field in self.metadata_fields if field in record):
            return record
        return parse_json(line.decode("utf-8"))

    def _rejected(self, span: Span, offset: int, line: bytes, storage: StorageSettings) -> Rejected:
        """Why a line is no document; a slow path, so that the fast one stays short.

        Its line number is counted only for an error that stops: counting reads the file again.
        """
        stop = self.on_bad_record == "stop"
        place = line_place(span.path, offset, storage) if stop else byte_place(span.path, offset)
        try:
            if not line:
                raise RecordError("blank line", f"{place}: a blank line, which is no record. Remove the line.")
            fields = tuple(field for field in (self.text_field, self.url_field) if field)
            record = checked_object(decode_json(line.rstrip(), place), fields, place)
            for field in fields:
                checked_text(record[field], field, place)
            raise RecordError("no document", f"{place}: can't be read as a document. Mend or remove the line.")
        except RecordError as error:
            return Rejected.of(f"{shown_name(span.path)}#byte={offset}", error)


def _agreed(value: Any) -> bool:
    """Whether orjson surely read a value as json does: it makes floats of integers that need over 64 bits, and follows
    nested values further down than json."""
    return not isinstance(value, float | list | dict) or (isinstance(value, float) and abs(value) < 1 << 63)
