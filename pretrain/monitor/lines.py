"""Files of one JSON object a line that survive kill -9, a full disk and a reader who comes too early."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.files import publish_bytes

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TEXT_KEYS = ("event", "evaluation", "message")


def encode(line: dict[str, Any], leading: Iterable[str] = ()) -> bytes:
    """``line`` as JSON with a newline: the ``leading`` keys first, then the others by name.

    The order is fixed so that equal content is equal bytes; floats keep their full ``repr``. NaN and infinities,
    which JSON lacks, become the strings ``"nan"``, ``"inf"`` and ``"-inf"``; :func:`read` turns them back.

    Raises:
        TypeError: a value is not a number, a string, None, or a list or dictionary of them.
    """
    rank = {key: place for place, key in enumerate(leading)}
    ordered = {key: _spell(line[key]) for key in sorted(line, key=lambda key: (rank.get(key, len(rank)), key))}
    return (json.dumps(ordered, allow_nan=False, ensure_ascii=False) + "\n").encode()


class Lines(NamedTuple):
    """``objects`` of a file, the ``texts`` (with newline) they were read from, and whether a broken last line was left
    out because its writer died (``interrupted``)."""

    objects: list[dict[str, Any]]
    texts: list[bytes]
    interrupted: bool


def read(path: Path) -> Lines:
    """The lines of ``path`` in the order of the file; an absent file is an empty one.

    Raises:
        UserError: a line that is not the last one is no JSON object (the message has its number).
    """
    if not path.exists():
        return Lines([], [], False)
    *texts, tail = path.read_bytes().split(b"\n")
    objects = [_parse(path, number, text) for number, text in enumerate(texts, start=1)]
    if tail:
        try:
            objects.append(_parse(path, len(texts) + 1, tail))
            texts.append(tail)
        except UserError:  # no newline and no object: the write that kill -9 or a power cut interrupted
            return Lines(objects, [text + b"\n" for text in texts], True)
    return Lines(objects, [text + b"\n" for text in texts], False)


def mend(path: Path) -> None:
    """Take a half-written last line away, which would swallow the next one; an absent file becomes an empty one.

    Raises:
        UserError: another line is damaged.
        OSError: the file can't be written.
    """
    content = b"".join(read(path).texts)
    if not path.exists() or path.read_bytes() != content:
        publish_bytes(path, content)


def append(path: Path, content: bytes, *, durable: bool) -> None:
    """Append one whole line in one write; ``durable`` also flushes it to the disk.

    Raises:
        OSError: the disk is full or failing; what was written of the line is taken back.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, content)
            if written < len(content):
                written += os.write(descriptor, content[written:])
            if written < len(content):
                raise OSError(f"{path}: only {written} of {len(content)} bytes were written; is the disk full?")
        except OSError:
            os.ftruncate(descriptor, before)
            raise
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise _damaged(path, number, text) from error
    if not isinstance(parsed, dict):
        raise _damaged(path, number, text)
    return {key: value if key in _TEXT_KEYS else _unspell(value) for key, value in parsed.items()}


def _damaged(path: Path, number: int, text: bytes) -> UserError:
    return UserError(
        f"{path}, line {number}: not a JSON object: {text[:60]!r}. Every line but an interrupted last one must be "
        "one; mend or delete that line, or move the file away (it is a log: training does not need it)."
    )


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    if isinstance(value, dict):
        return {key: _spell(item) for key, item in value.items()}
    return value


def _unspell(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_unspell(item) for item in value]
    return value
