"""What a store raises: errors that keep root, name and offset, so that damage can be put on record."""

from __future__ import annotations

from ..errors import EXIT_CRASH, DataError


class StorageError(DataError):
    """A file of a store can't be read, or not all of it.

    Attributes:
        root: the store (credentials and query left out); ``name``: the file in it.
        start: the first byte that is missing, ``None`` if the whole file is.
        reason: what went wrong, without the place.
        transient: the storage failed until the deadline, but nothing says that the file is damaged or missing; the
            exit code then is that of a crash, so that a launcher starts the run again.
    """

    def __init__(
        self, root: str, name: str, start: int | None, reason: str, advice: str, *, transient: bool = False
    ) -> None:
        where = f"{join(root, name)}, from byte {start}" if start else join(root, name)
        super().__init__(f"{where}: {reason}. {advice}")
        self.root, self.name, self.start, self.reason, self.advice = root, name, start, reason, advice
        self.transient = transient
        if transient:
            self.exit_code = EXIT_CRASH

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.root, self.name, self.start, self.reason, self.advice, self.transient)


class MissingFileError(StorageError):
    """The storage says that there is no such file."""


class AccessError(StorageError):
    """The storage does not hand the file out, whatever it holds: an expired token, a certificate, a wrong address."""


class AbandonedError(StorageError):
    """Nobody waits for the file any more: this says nothing about it."""


class TransientError(Exception):
    """One attempt failed in a way that another may not: never leaves this package.

    Args:
        reason: for the log and for the error after the last attempt.
        retry_after: seconds the server asked to be left alone.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def join(root: str, name: str) -> str:
    """One readable address of the file ``name`` of ``root``."""
    if root.startswith("pipe:"):
        return f"{root} with {name}" if name else root
    return f"{root.rstrip('/')}/{name}" if name else root


def _rebuild(
    kind: type[StorageError], root: str, name: str, start: int | None, reason: str, advice: str, transient: bool
) -> StorageError:
    return kind(root, name, start, reason, advice, transient=transient)
