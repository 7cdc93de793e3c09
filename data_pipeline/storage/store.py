"""One interface to the files of a root, wherever it lies: a folder, http(s), s3, gs, or a command's output."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import UserError
from .errors import MissingFileError
from .retries import Retries
from .settings import StorageSettings

PIPE = "pipe:"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class Store(ABC):
    """The files below ``root``, read only. Threads may share a store; after a fork or unpickling it opens its
    connections anew.

    Attributes:
        root: where the files lie, for messages: without credentials and query.
        local: the folder itself when it is a plain local path; readers may then open files on their own.
        ranges: whether parts of a file can be read. Without, :meth:`size`, :meth:`exists` and :meth:`read_range`
            are refused, and only whole files are read.
    """

    local: Path | None = None
    ranges: bool = True

    def __init__(self, address: str, root: str, settings: StorageSettings) -> None:
        """``address`` is the root as it was given, ``root`` the same without what must not be shown."""
        self._address, self.root, self.settings = address, root, settings
        self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._address, self.settings)

    def _start(self) -> None:
        """Set up what must not be shared with another process."""
        self._pid = os.getpid()
        self._retried = Retries(self.root, self.settings.remote)

    def _here(self) -> None:
        """After a fork: threads do not come along, locks may be held, connections would be shared with the parent."""
        if self._pid != os.getpid():
            self._start()

    @property
    def retries(self) -> int:
        """How many attempts had to be repeated so far; counted in each process."""
        self._here()
        return self._retried.count

    def abandon(self) -> None:
        """Nobody waits any more for what threads of this process are reading here: those reads end soon, with a
        :class:`StorageError`. Later ones are as ever."""
        self._here()
        self._retried.abandon()

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            MissingFileError: there is none. StorageError: it can't be read whole.
        """
        return b"".join(self.stream(name))

    def fetch(self, name: str, to: BinaryIO, size: int | None = None) -> int:
        """Append a whole file to ``to``; returns its bytes. ``to`` is only ever appended to, never rewound, so that
        it may hash what it is given.

        Args:
            name: the file. to: where its bytes go. size: the bytes it must have, if that is known.

        Raises:
            MissingFileError: there is none. StorageError: it can't be read whole, or has another size.
            OSError: ``to`` can't be written.
        """
        done = 0
        for content in self.stream(name, size):
            to.write(content)
            done += len(content)
        return done

    def exists(self, name: str) -> bool:
        """Whether there is such a file.

        Raises:
            StorageError: the storage does not say. UserError: not :attr:`ranges`.
        """
        try:
            self.size(name)
        except MissingFileError:
            return False
        return True

    @abstractmethod
    def size(self, name: str) -> int:
        """The bytes of a file, without reading it.

        Raises:
            MissingFileError: there is none. StorageError: the storage does not say. UserError: not :attr:`ranges`.
        """

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of a file: exactly these or an error.

        Raises:
            MissingFileError: there is none. StorageError: it ends before, or can't be read.
            UserError: not :attr:`ranges`.
        """

    @abstractmethod
    def stream(self, name: str, size: int | None = None) -> Iterator[bytes]:
        """A whole file from its beginning in pieces of any length, at most one pass; ends only where the file ends.

        All bytes that came before a failure are yielded before it is raised.

        Raises:
            MissingFileError: there is none. StorageError: it can't be read whole, or has another size than ``size``.
        """

    def _checked(self, name: str) -> str:
        """``name``, unless ``secure`` forbids it."""
        path = PurePosixPath(name)
        if self.settings.secure and (path.is_absolute() or ".." in path.parts):
            raise UserError(
                f"the name {name!r} leaves its root {self.root}, which the setting `secure` forbids. "
                "Mend the list of files it stands in, or set secure to false if you trust it."
            )
        return name


def scheme(url: str) -> str:
    """``"pipe"``, the lower-case scheme of a URL, or ``""`` for a plain local path."""
    if url.startswith(PIPE):
        return "pipe"
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def open_store(root: str, settings: StorageSettings | None = None) -> Store:
    """The store of ``root``: a local path, ``file://``, ``http(s)://``, ``s3://``, ``gs://`` (or another scheme that
    fsspec knows), or ``pipe:COMMAND`` where ``{}`` in the command stands for a file's name.

    Nothing is read or connected yet. The query of an http root (``?token=...``) is sent with every file's address.

    Raises:
        UserError: nobody knows the scheme, the package that serves it is not installed, a ``pipe:`` command has no
            ``{}``, or ``secure`` forbids ``pipe:``.
    """
    settings = settings or StorageSettings()
    kind = scheme(root)
    # each kind brings its own libraries, which the others do not wait for
    if kind == "pipe":
        from .pipe import PipeStore

        return PipeStore(root, settings)
    if kind in ("", "file"):
        from .local import LocalStore

        return LocalStore(root, settings)
    if kind in ("http", "https"):
        from .http import HttpStore

        return HttpStore(root, settings)
    from .objects import ObjectStore

    return ObjectStore(root, settings)
