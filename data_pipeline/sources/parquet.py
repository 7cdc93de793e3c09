"""Parquet files: one column holds the text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ..errors import DataError, UserError
from ..storage import StorageSettings
from .base import Document, FileSource, Part, Rejected, Span
from .inputs import DEFAULT_STORAGE, empty_input, is_remote
from .records import RecordError, checked_text, json_ready, no_value, not_utf8

_BATCH_ROWS = 1024


class ParquetSource(FileSource):
    """Parquet files on this machine."""

    kind: Literal["parquet"]
    text_column: str = Field(default="text", description="The column that holds the documents.")
    url_column: str | None = Field(
        default=None, description="A column that says where each document came from. Unset: path#row=number."
    )
    metadata_columns: tuple[str, ...] = Field(default=(), description="Columns to keep beside each document.")

    def input_files(self, storage: StorageSettings = DEFAULT_STORAGE) -> list[str]:
        """The files that the patterns name, each once, sorted.

        Raises:
            UserError: a pattern names no file, or one that is not on this machine.
        """
        names = super().input_files(storage)
        for name in filter(is_remote, names):
            raise UserError(
                f"input {name!r} (source of domain {self.domain!r}): kind `parquet` reads files of this machine. "
                "Use kind `datasets` with path `parquet` and data_files, or fetch it first."
            )
        return names

    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """Runs of row groups of about ``part_bytes`` uncompressed bytes; a part never spans files."""
        parts: list[Part] = []
        for path in self.input_files(storage):
            metadata = self._open(path).metadata
            first, total = 0, 0
            for group in range(metadata.num_row_groups):
                total += metadata.row_group(group).total_byte_size
                if total >= part_bytes or group == metadata.num_row_groups - 1:
                    parts.append(Part((Span(path, first, group + 1),), total))
                    first, total = group + 1, 0
        return parts

    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """The rows of the part's row groups."""
        for span in part.spans:
            file = self._open(span.path)
            row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            try:
                for batch in file.iter_batches(_BATCH_ROWS, range(span.start, span.stop), self._columns):
                    for values in _rows(batch):
                        yield self._record(span.path, row, values)
                        row += 1
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{span.path}, after row {row}: {str(error).rstrip('.')}. Fetch the file again."
                ) from error

    @property
    def _columns(self) -> list[str]:
        return list(dict.fromkeys([self.text_column, *filter(None, [self.url_column]), *self.metadata_columns]))

    def _record(self, path: str, row: int, values: dict[str, Any] | ValueError | OverflowError) -> Document | Rejected:
        place, url = f"{path}, row {row}", f"{path}#row={row}"
        try:
            if isinstance(values, UnicodeDecodeError):
                raise not_utf8(values, place)
            if isinstance(values, Exception):
                raise no_value(values, place)
            text = checked_text(values[self.text_column], self.text_column, place)
            if self.url_column is not None:
                url = checked_text(values[self.url_column], self.url_column, place)
        except RecordError as error:
            return Rejected.of(url, error)
        kept = {column: json_ready(values[column], column) for column in self.metadata_columns}
        return Document(text, url, kept or None)

    def _open(self, path: str) -> Any:
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            raise empty_input(path)
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            problem = str(error).rstrip(".")
            raise UserError(f"{path} can't be read as parquet: {problem}. Mend `files` or fetch it again.") from error
        names = file.schema_arrow.names
        for column in self._columns:
            if names.count(column) > 1:
                raise UserError(
                    f"{path} has {names.count(column)} columns named {column!r}, of which nobody can tell which is "
                    "meant. Write it again with names of their own."
                )
            if column not in names:
                known = ", ".join(names)
                raise UserError(
                    f"{path} has no column {column!r}; its columns: {known}. Set text_column, url_column or "
                    "metadata_columns."
                )
        return file


def _rows(batch: Any) -> Iterator[dict[str, Any] | ValueError | OverflowError]:
    """The rows of a record batch. Nobody checks values when a file is written: in place of a row with a string that is
    not UTF-8, or a time that Python has not (years beyond 9999), stands the error."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield error
    else:
        yield from rows
