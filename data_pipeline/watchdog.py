"""Says what a reader waits for that should long have answered: a disk, a server, a pipe."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from .reader import TokenSource

_LOOKS = 10
"""Looks per ``seconds``: how exactly the time is measured."""


class Watchdog:
    """A daemon thread that looks at what the sources are reading and speaks up about a read that takes too long.

    Readers only leave a note of the block they are at, so that being watched costs them nothing.

    Args:
        sources: by name.
        seconds: how long one read may take before ``on_wait`` is called; then again after twice the time, four times...
        on_wait: takes the message, in the watchdog's thread.
    """

    def __init__(
        self, sources: Sequence[tuple[str, TokenSource]], seconds: float, on_wait: Callable[[str], None]
    ) -> None:
        self._sources, self._seconds, self._on_wait = tuple(sources), seconds, on_wait
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="data-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        # by source: the note last seen, when it was seen first, and after how long to speak up about it
        seen: dict[str, tuple[tuple[int, int] | None, float, float]] = {}
        while not self._closed.wait(self._seconds / _LOOKS):
            now = time.monotonic()
            for name, source in self._sources:
                note, since, after = seen.get(name, (None, now, self._seconds))
                if source.reading is not note:
                    note, since, after = source.reading, now, self._seconds
                elif note is not None and now - since >= after:
                    self._on_wait(_message(name, source, note, now - since))
                    after *= 2
                seen[name] = note, since, after


def _message(name: str, source: TokenSource, note: tuple[int, int], seconds: float) -> str:
    shard, block = note
    return (
        f"source {name!r} has been waiting for {seconds:.1f} s for block {block} of shard {source.where(shard)}, at "
        f"byte offset {source.manifest.layout.data_offset(block)}. Look whether the disk or the server that holds it "
        "answers."
    )
