"""Any data set that the `datasets` library opens: of the hub, or of local files; always streamed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from ..errors import DataError, UserError
from ..storage import StorageSettings
from .base import Document, Part, Rejected, Source, Span
from .inputs import DEFAULT_STORAGE, input_stamp, is_remote
from .records import RecordError, checked_text, json_ready


class DatasetsSource(Source):
    """A `datasets` data set."""

    compared_at_the_end: ClassVar[bool] = True
    """Each part opens the data set anew: between two of them a file may change, or a revision appear on the hub."""

    kind: Literal["datasets"]
    path: str = Field(description="Hub name (`allenai/c4`), local folder, or a format (`json`, `parquet`, `text`).")
    name: str | None = Field(default=None, description="The configuration of the data set (`en`).")
    split: str = Field(default="train", description="The split to read.")
    revision: str | None = Field(default=None, description="Commit or tag on the hub; name one to pin the content.")
    data_files: tuple[str, ...] | None = Field(default=None, description="Files or globs, for a format or a folder.")
    text_field: str = Field(default="text", description="The column that holds the documents.")
    url_field: str | None = Field(
        default=None, description="A column that says where each document came from. Unset: path/split/shard#row."
    )

    metadata_fields: tuple[str, ...] = Field(default=(), description="Columns to keep beside each document.")

    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """One part per shard of the data set (for most: one per file)."""
        shards = self._open().num_shards
        return [Part((Span(self.path, shard, shard + 1),), 0) for shard in range(shards)]

    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """The rows of the part's shards."""
        dataset = self._open()
        for span in part.spans:
            for shard in range(span.start, span.stop):
                yield from self._rows(dataset.shard(dataset.num_shards, shard), shard)

    def stamp(self, storage: StorageSettings = DEFAULT_STORAGE) -> dict[str, Any]:
        """The files behind the split: sizes of local ones, addresses (revision included) of remote ones."""
        builder = self._builder()
        files = (builder.config.data_files or {}).get(self.split, [])
        stamps = {str(file): "remote" if is_remote(str(file)) else input_stamp(str(file)) for file in files}
        return {"shards": self._open().num_shards, "builder": builder.hash or "", **stamps}

    def _rows(self, rows: Any, shard: int) -> Iterator[Document | Rejected]:
        place = f"{self.path} ({self.split}), shard {shard}"
        columns = [field for field in (self.text_field, self.url_field, *self.metadata_fields) if field]
        number = 0
        try:
            for number, row in enumerate(rows):
                if missing := [column for column in columns if column not in row]:
                    raise DataError(
                        f"{place}: has no column {missing[0]!r}; its columns: {', '.join(row)}. "
                        "Set text_field, url_field or metadata_fields."
                    )
                yield self._record(row, f"{place}, row {number}", f"{self.path}/{self.split}/{shard}#row={number}")
        except _library_errors() as error:
            raise DataError(f"{place}, after row {number}: {_one_line(error)}") from error

    def _record(self, row: dict[str, Any], place: str, url: str) -> Document | Rejected:
        try:
            text = checked_text(row[self.text_field], self.text_field, place)
            if self.url_field is not None:
                url = checked_text(row[self.url_field], self.url_field, place)
        except RecordError as error:
            return Rejected.of(url, error)
        kept = {field: json_ready(row[field], field) for field in self.metadata_fields}
        return Document(text, url, kept or None)

    def _open(self) -> Any:
        return self._call("load_dataset", split=self.split, streaming=True)

    def _builder(self) -> Any:
        return self._call("load_dataset_builder")

    def _call(self, function: str, **options: Any) -> Any:
        files = list(self.data_files) if self.data_files else None
        if files:
            options["data_files"] = {self.split: files}
        try:
            return getattr(_datasets(), function)(self.path, self.name, revision=self.revision, **options)
        except _library_errors() as error:
            raise UserError(f"data set {self.path!r} can't be opened: {_one_line(error)}") from error


def _datasets() -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError("a source of kind `datasets` needs the datasets library: pip install headrace[hf]") from error


def _library_errors() -> tuple[type[Exception], ...]:
    """What the library raises for a wrong name, a missing file or a bad record."""
    # Arrow's own are not all ValueErrors; times that Python has not (years beyond 9999) overflow
    return (OSError, ValueError, OverflowError, pa.ArrowException, _datasets().exceptions.DatasetsError)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
