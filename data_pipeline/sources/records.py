"""Checks of one record, and the error that names a bad one."""

from __future__ import annotations

import json
import math
import re
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from ..errors import DataError, UserError

NOT_UTF8: Final = "not UTF-8"

DEEPEST_JSON: Final = 500
"""Arrays and objects inside each other that JSON may have. Python's own bound is what its stack has left, which hangs
on where it is called from: without this one, a record would be taken by one process and refused by another."""

_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)


class RecordError(DataError):
    """One record that is no document: ``reason`` in a few words to count by, the message as of every user error."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def not_utf8(error: UnicodeDecodeError, place: str) -> RecordError:
    """The error for a record that is not UTF-8; ``place`` says where it stands."""
    return RecordError(
        NOT_UTF8,
        f"{place}: not UTF-8 (byte {error.start} of the record is 0x{error.object[error.start]:02x}). "
        "Convert the file, or leave it out.",
    )


def no_value(error: Exception, place: str) -> RecordError:
    """The error for a table's row with a value that Python can't hold; ``place`` says where it stands."""
    return RecordError("no readable value", f"{place}: holds a value that can't be read ({error}). Mend the row.")


def decode_utf8(content: bytes, place: str) -> str:
    """``content`` as text; ``place`` says in the message where it stands.

    Raises:
        RecordError: not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, place) from error


def decode_json(content: bytes, place: str) -> Any:
    """The value in ``content``, which is UTF-8 JSON.

    Raises:
        RecordError: not UTF-8, or not JSON.
    """
    text = decode_utf8(content, place)
    try:
        return parse_json(text)
    except ValueError as error:
        raise RecordError(
            "not JSON", f"{place}: not valid JSON ({error}): {text.strip()[:60]!r}. Mend or remove the record."
        ) from error


def parse_json(text: str) -> Any:
    """The value of ``text`` as the standard library reads it, everywhere the same.

    Raises:
        ValueError: not JSON, or nested deeper than ``DEEPEST_JSON``.
    """
    if text.count("[") + text.count("{") > DEEPEST_JSON and _depth(text) > DEEPEST_JSON:
        raise ValueError(f"nested deeper than {DEEPEST_JSON}")
    return json.loads(text)


def _depth(text: str) -> int:
    """How many brackets are open at once, at most."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def checked_text(value: Any, field: str, place: str) -> str:
    """``value`` if it is a string that UTF-8 can hold.

    Raises:
        RecordError: not a string, or a string with half a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError(
            f"{field} is no string",
            f"{place}: field {field!r} holds {type(value).__name__}, not a string. Mend the record.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            "half a surrogate pair",
            f"{place}: field {field!r} holds half a surrogate pair (character {error.start}), which is no text. "
            "Mend the record.",
        ) from error
    return value


def checked_object(value: Any, fields: tuple[str, ...], place: str) -> dict[str, Any]:
    """``value`` if it is a JSON object that has ``fields``.

    Raises:
        RecordError: not an object, or a field is missing.
    """
    if not isinstance(value, dict):
        raise RecordError(
            "no JSON object", f"{place}: holds {type(value).__name__}, not a JSON object. Mend or remove the record."
        )
    for field in fields:
        if field not in value:
            known = ", ".join(sorted(value)) or "none"
            raise RecordError(
                f"no field {field}",
                f"{place}: has no field {field!r}; its fields: {known}. Set text_field or url_field.",
            )
    return value


def json_ready(value: Any, field: str) -> Any:
    """``value`` of ``field`` as JSON can hold it: dates, decimals and the like as their text, bytes as text with
    escapes.

    Raises:
        UserError: an object of a library (an image), whose text would name its place in memory.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    try:
        return json.loads(json.dumps(value, default=_as_text))
    except TypeError as error:
        raise UserError(
            f"{field!r} holds {error}, which can't be kept beside a document. Take it out of the metadata to keep."
        ) from error


def strict_json(value: Any) -> bytes:
    """``value`` (JSON, but for numbers that are not finite, which Python reads and writes) as JSON with sorted keys;
    such numbers as the text that Python writes for them."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(value), sort_keys=True).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    raise TypeError(type(value).__name__)
