"""What all remote stores with byte ranges share: retries, exact lengths, and reading ahead in parallel, in order."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event

from .errors import AbandonedError, StorageError
from .retries import Deadline
from .store import Store

COPY_ADVICE = "Restore the file from a copy, or, if it was replaced on purpose, start again with the new one."


@dataclass(frozen=True)
class Version:
    """What identifies the content of a remote file: its size in bytes and, if the server gives one, its tag; or else
    when it was modified, in the server's words."""

    size: int
    tag: str | None = None
    modified: str | None = None


class RemoteStore(Store):
    """A store whose files are read by byte range, each range retried on its own."""

    def _start(self) -> None:
        super()._start()
        self._threads = ThreadPoolExecutor(self.settings.remote.parallel, "headrace-storage")

    @abstractmethod
    def _version(self, name: str, until: Deadline) -> Version:
        """One attempt to learn a file's size."""

    @abstractmethod
    def _get(self, name: str, start: int, stop: int, until: Deadline) -> tuple[bytes, Version | None]:
        """One attempt at exactly the bytes ``start`` to ``stop``, and the version they are of if the answer says so.

        Raises:
            StorageError: the file ends before ``stop``, or the server does not know byte ranges.
        """

    @abstractmethod
    def _begin(self, name: str, until: Deadline) -> tuple[bytes, Version]:
        """One attempt at the first ``range_bytes`` of a file, or all of it if it has fewer."""

    def size(self, name: str) -> int:
        return self.version(name).size

    def version(self, name: str) -> Version:
        """What the storage says of a file, without reading it; errors are those of :meth:`size`."""
        self._here()
        return self._retried(name, 0, None, lambda until: self._version(self._checked(name), until))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        self._here()
        self._checked(name)
        if stop <= start:
            return b""
        if stop - start <= self.settings.remote.range_bytes:
            return self._exact(name, start, stop, None, Event())
        return b"".join(self._ahead(name, start, stop, None))

    def stream(self, name: str, size: int | None = None) -> Iterator[bytes]:
        self._here()
        self._checked(name)
        done = 0
        for content in self._pieces(name, size):
            yield content
            done += len(content)
        self._check_size(name, done, size)

    def _pieces(self, name: str, size: int | None) -> Iterator[bytes]:
        if size is not None and self._knows_ranges():
            # all pieces at once: nothing has to be learned from the first
            yield from self._ahead(name, 0, size, Version(size))
            return
        content, version = self._retried(name, 0, None, lambda until: self._begin(name, until))
        self._check_size(name, version.size, size)
        yield content
        yield from self._ahead(name, len(content), version.size, version)

    def _knows_ranges(self) -> bool:
        """Whether the server is known to answer requests for byte ranges."""
        return True

    def _check_size(self, name: str, found: int, wanted: int | None) -> None:
        """Raise :class:`StorageError` unless the size found is the one wanted, if any is."""
        if wanted is not None and found != wanted:
            reason = f"the file has {found} bytes where {wanted} were expected"
            raise StorageError(self.root, name, min(found, wanted), reason, COPY_ADVICE)

    def _exact(self, name: str, start: int, stop: int, version: Version | None, abandoned: Event) -> bytes:
        def attempt(until: Deadline) -> tuple[bytes, Version | None]:
            # else the repetitions of a range that nobody waits for would hold up the end of the process
            if abandoned.is_set():
                raise AbandonedError(self.root, name, start, "nobody waits for it any more", COPY_ADVICE)
            return self._get(name, start, stop, until)

        content, found = self._retried(name, start, stop, attempt)
        if version and found:
            self._check_size(name, found.size, version.size)
            if version.tag and found.tag and version.tag != found.tag:
                reason = f"the file changed while it was read (tag {version.tag} became {found.tag})"
                raise StorageError(self.root, name, start, reason, COPY_ADVICE)
        return content

    def _ahead(self, name: str, start: int, stop: int, version: Version | None) -> Iterator[bytes]:
        """The pieces of ``start`` to ``stop`` in order, the next ones on their way while one is looked at."""
        length, parallel = self.settings.remote.range_bytes, self.settings.remote.parallel
        waiting: deque[Future[bytes]] = deque()
        abandoned = Event()
        try:
            for first in range(start, stop, length):
                last = min(first + length, stop)
                waiting.append(self._threads.submit(self._exact, name, first, last, version, abandoned))
                # twice as many as run at once: while the foremost waits for a retry, the threads still have work
                if len(waiting) >= 2 * parallel:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            abandoned.set()
            for piece in waiting:
                piece.cancel()
