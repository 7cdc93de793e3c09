"""A folder of this machine as a store."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import MissingFileError, StorageError
from .settings import StorageSettings
from .store import Store

_PIECE = 2**20


class LocalStore(Store):
    """The files below a folder, given as a path or as ``file://`` and a path."""

    def __init__(self, root: str, settings: StorageSettings) -> None:
        path = root.removeprefix("file://")
        super().__init__(root, path, settings)
        self.local: Path = Path(path)

    def size(self, name: str) -> int:
        try:
            return self._path(name).stat().st_size
        except OSError as error:
            raise self._error(name, 0, error) from error

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        try:
            with self._path(name).open("rb", buffering=0) as file:
                content = _pread(file.fileno(), start, stop)
        except OSError as error:
            raise self._error(name, start, error) from error
        if len(content) < stop - start:
            raise self._short(name, start + len(content), stop)
        return content

    def stream(self, name: str, size: int | None = None) -> Iterator[bytes]:
        done = 0
        with self._open(name) as file:
            while True:
                try:
                    content = file.read(_PIECE)
                except OSError as error:
                    raise self._error(name, done, error) from error
                if not content:
                    break
                yield content
                done += len(content)
        if size is not None and done != size:
            raise self._short(name, done, size)

    def _open(self, name: str) -> BinaryIO:
        try:
            return self._path(name).open("rb")
        except OSError as error:
            raise self._error(name, 0, error) from error

    def _path(self, name: str) -> Path:
        return self.local / self._checked(name)

    def _error(self, name: str, start: int, error: OSError) -> StorageError:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return MissingFileError(self.root, name, None, "there is no such file", "Restore it from a copy.")
        reason = f"the disk says {error.strerror or error}"
        return StorageError(self.root, name, start, reason, "Look after the disk, or restore the file from a copy.")

    def _short(self, name: str, found: int, wanted: int) -> StorageError:
        how = "ends" if found < wanted else "goes on"
        reason = f"the file {how} at byte {found} where {wanted} bytes were to be read"
        return StorageError(self.root, name, min(found, wanted), reason, "Restore it from a copy.")


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    pieces = []
    while start < stop and (piece := os.pread(descriptor, stop - start, start)):
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces)
