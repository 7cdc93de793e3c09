"""Files behind http(s): no answer is taken as data unless status, byte range and length are those asked for.

urllib3 under our own checks: fsspec's http file system does not look at the status or the ``Content-Range`` of an
answer to a request for a byte range, so that a server that ignores the range, or shifts it, would go unnoticed.
(RFC 9110, sections 14 and 15, says what servers may answer.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing

from urllib3.exceptions import HTTPError

from .errors import AccessError, StorageError, TransientError
from .http_client import PIECE, Answer, HttpClient, describe, read_body
from .remote import COPY_ADVICE, RemoteStore, Version
from .retries import Deadline
from .settings import StorageSettings

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_UNSATISFIED = re.compile(r"bytes \*/(\d+)")
_NO_HEAD_STATUSES = frozenset({403, 405, 501})
# a server is said not to know byte ranges after so many whole files in a row; fewer may be a slip of one of its nodes
_GIVE_UP_RANGES_AFTER = 3
LENGTH_ADVICE = "Without it, nobody can tell whether all of it came. Serve the file with a Content-Length."


class RangesIgnoredError(AccessError):
    """The server answers requests for a byte range with the whole file."""


class HttpStore(RemoteStore):
    """Files below an http(s) address."""

    def __init__(self, root: str, settings: StorageSettings) -> None:
        super().__init__(root, HttpClient(root, settings.remote).root, settings)

    def _start(self) -> None:
        super()._start()
        self._client = HttpClient(self._address, self.settings.remote)
        self._answered_ranges, self._ignored_ranges = False, 0

    def _version(self, name: str, until: Deadline) -> Version:
        answer = self._client.ask("HEAD", name, None, until, {200, *_NO_HEAD_STATUSES})
        answer.drain_conn()
        if answer.status == 200 and (length := answer.headers.get("Content-Length")) is not None:
            return _version_of(int(length), answer)
        # addresses signed for GET refuse HEAD; the answer about one byte tells the size, too
        answer = self._client.ask("GET", name, (0, 1), until, {200, 206, 416})
        answer.close()
        content_range = answer.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(content_range) or _UNSATISFIED.fullmatch(content_range)
        length = found[found.re.groups] if found else answer.headers.get("Content-Length")
        if length is None or length == "*" or (answer.status != 200 and not found):
            raise StorageError(self.root, name, None, "the server does not tell the file's size", LENGTH_ADVICE)
        return _version_of(int(length), answer)

    def _begin(self, name: str, until: Deadline) -> tuple[bytes, Version]:
        length = self.settings.remote.range_bytes
        with closing(self._client.ask("GET", name, (0, length), until, {200, 206, 416})) as answer:
            if answer.status == 200:
                raise self._ignored(name, 0)
            if answer.status == 206:
                self._answered_ranges = True
                start, stop, version = self._range_of(answer)
                version = version or self._version(name, until)
                if start == 0 and stop == min(length, version.size):
                    return read_body(answer, stop, until), version
                raise TransientError(f"the server sent bytes {start} to {stop} when asked for 0 to {length}")
        version = self._version(name, until)
        if version.size:
            raise TransientError(f"HTTP status 416 for the beginning of a file of {version.size} bytes")
        return b"", version

    def _get(self, name: str, start: int, stop: int, until: Deadline) -> tuple[bytes, Version | None]:
        with closing(self._client.ask("GET", name, (start, stop), until, {200, 206, 416})) as answer:
            if answer.status == 416:
                raise self._ends_early(name, start, stop, "HTTP status 416")
            if answer.status == 200:
                self._ignored_ranges += 1
                if not self._answered_ranges and self._ignored_ranges >= _GIVE_UP_RANGES_AFTER:
                    raise self._ignored(name, start)
                raise TransientError("the server sent the whole file when asked for a byte range")
            first, end, version = self._range_of(answer)
            if (first, end) == (start, stop):
                self._answered_ranges = True
                return read_body(answer, stop - start, until), version
            if first == start and version and end == version.size < stop:
                raise self._ends_early(name, version.size, stop, f"it has {version.size} bytes")
            raise TransientError(f"the server sent bytes {first} to {end} when asked for {start} to {stop}")

    def _knows_ranges(self) -> bool:
        return self._answered_ranges

    def _pieces(self, name: str, size: int | None) -> Iterator[bytes]:
        try:
            yield from super()._pieces(name, size)
        except RangesIgnoredError:
            whole = _Whole(self._client, name)
            with closing(whole):
                while content := self._retried(name, whole.done, None, whole.next):
                    yield content

    def _range_of(self, answer: Answer) -> tuple[int, int, Version | None]:
        """Start, stop and version that a 206 claims for its body; the version only if it tells the total."""
        said = answer.headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(said)
        if not found:
            raise TransientError(f"HTTP status 206 with Content-Range {said!r}")
        version = None if found[3] == "*" else _version_of(int(found[3]), answer)
        return int(found[1]), int(found[2]) + 1, version

    def _ends_early(self, name: str, start: int, stop: int, found: str) -> StorageError:
        return StorageError(self.root, name, start, f"the file ends before byte {stop} ({found})", COPY_ADVICE)

    def _ignored(self, name: str, start: int) -> RangesIgnoredError:
        return RangesIgnoredError(
            self.root,
            name,
            start,
            "the server answers requests for a byte range with the whole file",
            "Read whole files (`data.order: full`, and no `data.windows`), or serve the files with byte ranges "
            "(nginx, Apache and every object store do).",
        )


def _version_of(size: int, answer: Answer) -> Version:
    return Version(size, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))


class _Whole:
    """A file over one connection from a server without byte ranges; after a break it is asked for again, and what was
    delivered is skipped."""

    def __init__(self, client: HttpClient, name: str) -> None:
        self._client, self._name = client, name
        self._answer: Answer | None = None
        self._known: tuple[str | None, ...] | None = None
        self.done = 0

    def next(self, until: Deadline) -> bytes:
        """The next piece, empty at the end; one attempt."""
        if self._answer is None:
            self._answer, skip = self._open(until), self.done
        else:
            skip = 0
        try:
            while skip:
                skipped = len(self._answer.read(min(PIECE, skip)))
                if not skipped:
                    raise TransientError(f"the file ended before byte {self.done}, which it had before")
                skip -= skipped
            content = self._answer.read(PIECE)
        except (HTTPError, TransientError) as error:
            self.close()
            raise TransientError(f"the transfer broke off ({describe(error)})") from error
        self.done += len(content)
        return content

    def _open(self, until: Deadline) -> Answer:
        answer = self._client.ask("GET", self._name, None, until, {200})
        headers = answer.headers
        if "Content-Length" not in headers and headers.get("Transfer-Encoding", "").lower() != "chunked":
            answer.close()
            raise StorageError(
                self._client.root, self._name, None, "the server does not tell where the file ends", LENGTH_ADVICE
            )
        known = headers.get("Content-Length"), headers.get("ETag")
        if self._known not in (None, known):
            answer.close()
            raise TransientError(f"the file changed while it was read (length and tag {self._known} became {known})")
        self._known = known
        return answer

    def close(self) -> None:
        """Give the connection up."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None
