"""Open files and whatever else is dear to have and bounded in number."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from typing import BinaryIO, Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


def open_files_limit() -> int:
    """How many files one source keeps open: few where the process may have few (8 sources of 64 fit into 1024)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else max(16, min(256, soft // 16))


class RecentlyUsed(Generic[Key, Value]):
    """The ``limit`` values used last; ``drop`` is called with what falls out."""

    def __init__(self, limit: int, drop: Callable[[Value], None] = lambda value: None) -> None:
        self._limit, self._drop = limit, drop
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self._last: tuple[Key | None, Value | None] = None, None

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def get(self, key: Key) -> Value | None:
        if key == self._last[0]:
            return self._last[1]
        value = self._kept.get(key)
        if value is not None:
            self._kept.move_to_end(key)
            self._last = key, value
        return value

    def put(self, key: Key, value: Value) -> Value:
        while len(self._kept) >= self._limit:
            self._drop(self._kept.popitem(last=False)[1])
        self._kept[key] = value
        self._last = key, value
        return value

    def remove(self, key: Key) -> None:
        if key in self._kept:
            self._drop(self._kept.pop(key))
        self._last = None, None

    def clear(self) -> None:
        self._last = None, None
        while self._kept:
            self._drop(self._kept.popitem()[1])


class OpenFile:
    """An open file that holds the bytes of a shard from byte ``start`` on. ``as_found``: it is known to be damaged, and
    may be another time than when its blocks were checked first."""

    def __init__(self, handle: BinaryIO, start: int, where: str, as_found: bool = False) -> None:
        self.handle, self.start, self.where, self.as_found = handle, start, where, as_found
        self.descriptor = handle.fileno()

    def read(self, into: memoryview, offset: int) -> int:
        """Fill ``into`` from byte ``offset`` of the shard on; returns how many bytes there were up to the file's end.

        Raises:
            OSError: the disk failed; names the file and the byte.
        """
        done = 0
        while done < len(into):
            try:
                got = os.preadv(self.descriptor, [into[done:] if done else into], offset + done - self.start)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} (byte {offset + done})", self.where) from error
            if got == 0:
                break
            done += got
        return done

    def close(self) -> None:
        self.handle.close()
