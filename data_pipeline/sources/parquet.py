"""Parquet files: one column holds the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ..errors import DataError, UserError
from .base import Document, FileSource, Part, Span, checked_text

_BATCH_ROWS = 1024


class ParquetSource(FileSource):
    """Parquet files."""

    kind: Literal["parquet"]
    text_column: str = Field(default="text", description="The column that holds the documents.")
    url_column: str | None = Field(
        default=None, description="A column that says where each document came from. Unset: path#row=number."
    )

    def parts(self, part_bytes: int) -> list[Part]:
        """Runs of row groups of about ``part_bytes`` uncompressed bytes; a part never spans files."""
        parts: list[Part] = []
        for path in self.input_files():
            metadata = self._open(path).metadata
            first, total = 0, 0
            for group in range(metadata.num_row_groups):
                total += metadata.row_group(group).total_byte_size
                if total >= part_bytes or group == metadata.num_row_groups - 1:
                    parts.append(Part((Span(path, first, group + 1),), total))
                    first, total = group + 1, 0
        return parts

    def read(self, part: Part) -> Iterator[Document]:
        """The rows of the part's row groups."""
        for span in part.spans:
            file = self._open(span.path)
            row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            columns = [self.text_column, *filter(None, [self.url_column])]
            try:
                for batch in file.iter_batches(_BATCH_ROWS, range(span.start, span.stop), columns):
                    yield from self._documents(span.path, row, batch)
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{span.path}, after row {row}: {error}. Fetch the file again.") from error

    def _documents(self, path: str, row: int, batch: Any) -> Iterator[Document]:
        urls = batch.column(self.url_column).to_pylist() if self.url_column else None
        for i, text in enumerate(batch.column(self.text_column).to_pylist()):
            place = f"{path}, row {row + i}"
            checked_text(text, self.text_column, place)
            url = checked_text(urls[i], self.url_column or "", place) if urls else f"{path}#row={row + i}"
            yield Document(text, url)

    def _open(self, path: str) -> Any:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} can't be read as parquet: {error}. Mend `files` or fetch it again.") from error
        for column in filter(None, (self.text_column, self.url_column)):
            if column not in file.schema_arrow.names:
                known = ", ".join(file.schema_arrow.names)
                raise UserError(
                    f"{path} has no column {column!r}; its columns: {known}. Set text_column or url_column."
                )
        return file
