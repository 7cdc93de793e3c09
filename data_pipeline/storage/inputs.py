"""One whole input as a binary stream that never ends silently short."""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

from ..errors import UserError
from .errors import StorageError, TransientError
from .pipe import command_output, failed, refuse_if_secure
from .settings import StorageSettings
from .store import PIPE, open_store, scheme

_BUFFER = 2**20
_HEAD_BYTES = 16


def open_input(url: str, settings: StorageSettings | None = None) -> io.BufferedReader:
    """The bytes of a local path, ``http(s)://``, ``s3://``, ``gs://`` or ``pipe:COMMAND``, from the first to the last.

    The end of the stream is the end of the input: lengths and the command's exit status were checked. Whatever came
    before a failure is delivered before the error is raised, by ``read``, too. Remote files are read ahead in
    parallel, with retries; a command runs once. Closing early kills a command.

    Raises:
        UserError: the scheme can't be read, or ``secure`` forbids the command; both at once.
        MissingFileError, StorageError: by any read: the input is missing, or ended where it should not.
    """
    settings = settings or StorageSettings()
    if scheme(url) == "pipe":
        refuse_if_secure(url, settings)
        return _Input(_Raw(_command(url, settings)))
    if scheme(url) in ("", "file"):
        path = Path(url.removeprefix("file://"))
        # the name is the user's own here, not one found in data
        store, name = open_store(str(path.parent), settings.model_copy(update={"secure": False})), path.name
    else:
        store, name = open_store(url, settings), ""
    return _Input(_Raw(store.stream(name)))


def _command(url: str, settings: StorageSettings) -> Generator[bytes, None, None]:
    command = url.removeprefix(PIPE)
    if not command.strip():
        raise UserError(f"{url!r} names no command. Write it as `pipe:COMMAND`.")
    done = 0
    try:
        with closing(command_output(command, settings.remote.deadline_seconds)) as pieces:
            for content in pieces:
                yield content
                done += len(content)
    except TransientError as error:
        raise failed(url, "", done, error) from error


def _with_whole_head(pieces: Iterator[bytes]) -> Generator[bytes, None, None]:
    """``pieces``, the first of at least ``_HEAD_BYTES``, if there are so many: they tell how a file is packed,
    and a command may print them one by one."""
    head = b""
    try:
        for piece in pieces:
            if len(head) < _HEAD_BYTES:
                head += piece
                if len(head) < _HEAD_BYTES:
                    continue
                piece = head
            yield piece
    except StorageError:
        if 0 < len(head) < _HEAD_BYTES:
            yield head
        raise
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
    if 0 < len(head) < _HEAD_BYTES:
        yield head


class _Raw(io.RawIOBase):
    """Pieces of bytes as a raw stream; a failure is raised again by every later read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = _with_whole_head(pieces)
        self._rest = memoryview(b"")
        self._failure: StorageError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer is 3.12
        if self._failure:
            raise self._failure
        try:
            while not self._rest and (piece := next(self._pieces, None)) is not None:
                self._rest = memoryview(piece)
        except StorageError as error:
            self._failure = error
            raise
        taken = min(len(buffer), len(self._rest))
        buffer[:taken] = self._rest[:taken]
        self._rest = self._rest[taken:]
        return taken

    def close(self) -> None:
        if not self.closed:
            self._pieces.close()
        super().close()


class _Input(io.BufferedReader):
    """A buffered stream whose ``read`` hands out what came before a failure, which the next read then raises: the
    standard one throws the bytes away that the failing call had collected."""

    def __init__(self, raw: _Raw) -> None:
        super().__init__(raw, _BUFFER)

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = -1 if size is None else size
        pieces: list[bytes] = []
        while wanted != 0:
            try:
                piece = self.read1(wanted)
            except StorageError:
                if not pieces:
                    raise
                break
            if not piece:
                break
            pieces.append(piece)
            wanted = wanted - len(piece) if wanted > 0 else wanted
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
