"""WebDataset tars of text: each sample one document, its other small fields kept beside it."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Collection, Iterator
from typing import Any, Final, Literal

from pydantic import Field, field_validator

from ..errors import UserError
from ..storage import StorageSettings
from ..tars import BadSample, Sample, group_samples, walk_tar
from .base import Document, FileSource, Part, Rejected, single_files
from .inputs import DEFAULT_STORAGE, open_input_file, shown_name
from .records import NOT_UTF8, RecordError, checked_object, checked_text, decode_json, decode_utf8
from .unpacking import DAMAGE

_TEXT_FIELDS: Final = ("txt", "json", "json.gz")
_LARGEST_METADATA: Final = 1 << 16


class WebDatasetSource(FileSource):
    """Tars, plain or packed (gzip, zstd), of `webdataset` samples."""

    kind: Literal["webdataset"]
    text_extension: str | None = Field(
        default=None,
        min_length=1,
        description="The field of a sample (`txt`, `content.json`) that holds the document: JSON where it ends in "
        "`json`, unpacked where it ends in `.gz`. Unset: the only one of `txt`, `json` and `json.gz` that there is.",
    )
    text_field: str = Field(default="text", description="Where the document is JSON: the key that holds its text.")
    url_field: str | None = Field(
        default=None, description="Where the document is JSON: a key that says where it came from. Unset: tar#key."
    )
    metadata_fields: tuple[str, ...] | None = Field(
        default=None,
        description="The other fields to keep beside each document, JSON as JSON and any other as text. Unset: every "
        "other one that is text and at most 64 KiB. The other keys of a JSON document are kept with it.",
    )
    optional_fields: tuple[str, ...] = Field(
        default=(),
        description="Fields that a sample may lack. Any other that the archive's first sample has must be in all of "
        "its samples.",
    )

    @field_validator("text_extension", "metadata_fields", "optional_fields")
    @classmethod
    def _as_fields_are_named(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for name in (value,) if isinstance(value, str) else value or ():
            if (named := name.lstrip(".").lower()) != name:
                raise ValueError(
                    f"no field is named {name!r}: names are in lower case, without a dot before: {named!r}"
                )
        return value

    def parts(self, part_bytes: int, storage: StorageSettings = DEFAULT_STORAGE) -> list[Part]:
        """One part per tar."""
        return single_files(self._sizes(storage))

    def records(self, part: Part, storage: StorageSettings) -> Iterator[Document | Rejected]:
        """The samples of the part's tars (url: tar#key)."""
        for span in part.spans:
            name = shown_name(span.path)
            with open_input_file(span.path, storage, recognise=True) as stream:
                samples = group_samples(walk_tar(stream, name), name, self._wanted, self.optional_fields)
                for sample in samples:
                    record = self._record(name, sample)
                    if isinstance(record, Rejected):
                        record = self.after_the_rest(record, span.path, samples)
                    yield record

    def _wanted(self, field: str, size: int) -> bool:
        if field == self.text_extension or (self.text_extension is None and field in _TEXT_FIELDS):
            return True
        return size <= _LARGEST_METADATA if self.metadata_fields is None else field in self.metadata_fields

    def _record(self, name: str, sample: Sample | BadSample) -> Document | Rejected:
        url = f"{name}#{sample.key}"
        place = f"{name}, byte {sample.offset}"
        if isinstance(sample, BadSample):
            return Rejected(url, sample.reason, f"{place}: {sample.problem}")
        try:
            return self._document(url, f"{place}, sample {sample.key!r}", sample)
        except RecordError as error:
            return Rejected.of(url, error)

    def _document(self, url: str, place: str, sample: Sample) -> Document:
        extension = self.text_extension or _only_text(sample.names, place)
        if extension not in sample.names:
            known = ", ".join(sorted(sample.names))
            raise RecordError(
                f"no field {extension}",
                f"{place}: has no field {extension!r}; its fields: {known}. Set text_extension.",
            )
        value = _decode(extension, sample.fields[extension], place)
        metadata = dict(self._metadata(extension, sample, place))
        if _is_json(extension):
            keys = tuple(filter(None, (self.text_field, self.url_field)))
            record = checked_object(value, keys, f"{place}, field {extension!r}")
            value = checked_text(record[self.text_field], self.text_field, place)
            if self.url_field is not None:
                url = checked_text(record[self.url_field], self.url_field, place)
            if others := {key: inner for key, inner in record.items() if key not in keys}:
                metadata[extension] = others
        return Document(value, url, metadata or None)

    def _metadata(self, extension: str, sample: Sample, place: str) -> Iterator[tuple[str, Any]]:
        """The other fields. Those that nobody named and that are binary (an image beside its caption) are left out."""
        for field in self.metadata_fields or ():
            if field not in sample.names and field not in self.optional_fields:
                raise _lacks(field, sample, place, "metadata_fields, or name it in optional_fields")
        for field, payload in sample.fields.items():
            if field == extension:
                continue
            try:
                yield field, _decode(field, payload, place)
            except RecordError as error:
                if self.metadata_fields is not None or _is_json(field) or error.reason != NOT_UTF8:
                    raise


def _only_text(fields: Collection[str], place: str) -> str:
    found = [field for field in _TEXT_FIELDS if field in fields]
    if len(found) > 1:
        raise UserError(
            f"{place}: has the fields {' and '.join(found)}, of which each may be the text. Set text_extension to one "
            "of them; the others are kept as metadata."
        )
    return found[0] if found else _TEXT_FIELDS[0]


def _lacks(field: str, sample: Sample, place: str, setting: str) -> RecordError:
    known = ", ".join(sorted(sample.names))
    return RecordError(f"no field {field}", f"{place}: has no field {field!r}; its fields: {known}. Set {setting}.")


def _is_json(field: str) -> bool:
    return field.removesuffix(".gz").rpartition(".")[2] == "json"


def _decode(field: str, payload: bytes, place: str) -> Any:
    """The text or JSON value of a field.

    Raises:
        RecordError: damaged gzip, not UTF-8, or not JSON.
    """
    place = f"{place}, field {field!r}"
    if field.endswith(".gz"):
        try:
            payload = gzip.decompress(payload)
        except DAMAGE as error:
            raise RecordError("damaged gzip", f"{place}: damaged gzip ({error}). Mend or remove the record.") from error
    payload = payload.removeprefix(codecs.BOM_UTF8)
    return (decode_json if _is_json(field) else decode_utf8)(payload, place)
