"""What a node fetched from remote storage, shared by its processes: one download each, bounded, never half a file.

An entry is a file named by its key, which the caller derives from the content that is wanted (a hash in the manifest,
never an address), so that two files of one name, or one file behind two addresses, are told apart or brought together
by what they hold. ``KEY.part`` is an entry being filled; whoever holds its ``flock`` fills it. The kernel drops the
lock of a killed process, so that what it left behind is known to be dead by being unlocked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .settings import CacheSettings

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_PART = ".part"
_LEDGER = ".bytes"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# evicting goes on to this share of the bound, so that not every new entry needs a look at all of them
_LOW_WATER = 0.95


class NodeCache:
    """A folder of entries, filled once per node. Threads and processes may share it, before and after a fork.

    The bound covers the entries and those being filled whose size was announced; it is exceeded only while what is
    being filled at one time is more than that. An entry evicted while a reader has it open stays readable, and keeps
    its space on the disk until it is closed.

    Args:
        settings: folder and bound.

    Raises:
        UserError: the folder can't be made or written.
    """

    def __init__(self, settings: CacheSettings) -> None:
        # a folder of our own inside the given one: eviction must never meet somebody else's files
        self.folder, self.bytes = cache_folder(settings) / "entries", settings.bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._ledger():
                pass
        except OSError as error:
            raise UserError(
                f"the cache folder {self.folder} can't be written ({error.strerror}). Give `cache.folder`, or set "
                "HEADRACE_CACHE, to a folder on a disk of this node that you may write to."
            ) from error
        for name in os.listdir(self.folder):
            if name.endswith(_PART):
                _remove_if_dead(self.folder / name)

    def open(self, key: str, fill: Callable[[BinaryIO], None], size: int | None = None) -> FileIO:
        """The entry ``key``, open for reading; made by ``fill`` if there is none. The caller closes it.

        Of all processes and threads of the node that ask for a missing entry, one fills it and the others wait.

        Args:
            key: a file name made of letters, digits, ``_``, ``.`` and ``-`` that identifies the content.
            fill: writes the content into the file it is given, from byte 0 on, and verifies it; the content ends
                where it leaves the position. If it raises, nothing is kept.
            size: the bytes ``fill`` will write, if known: room is then made before.

        Raises:
            UserError: the entry is larger than the whole cache may be, or the disk is full.
            Exception: whatever ``fill`` raises.
        """
        path = self.folder / _checked(key)
        try:
            while (entry := _open_entry(path)) is None:
                with _locked(self.folder / (key + _PART)) as part:
                    if part is None:
                        continue
                    # the entry may have appeared between the look for it and the lock
                    if not path.exists():
                        return self._fill(path, part, fill, size)
                    part.unlink()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise UserError(
                f"the disk of the cache folder {self.folder} is full: {key} could not be written ({error.strerror}). "
                f"Free space there, give `cache.folder` another disk, or lower `cache.bytes` (now {self.bytes}) so "
                "that the cache itself leaves room."
            ) from error
        return entry

    def discard(self, key: str) -> None:
        """Forget an entry that turned out to be damaged; readers who have it open keep it."""
        (self.folder / _checked(key)).unlink(missing_ok=True)

    def _fill(self, path: Path, part: Path, fill: Callable[[BinaryIO], None], size: int | None) -> FileIO:
        announced = size or 0
        try:
            with open(part, "r+b") as file:
                # a hole of the announced size, which others count when they look for room; what a killed filler left
                # goes first
                file.truncate(0)
                file.truncate(announced)
                self._reserve(path.name, announced, 0)
                fill(file)
                written = file.tell()
                file.truncate(written)
                file.flush()
                os.fsync(file.fileno())
            if written > announced:
                self._reserve(path.name, written, announced)
            # opened under its old name: once renamed, another process may evict it at any time
            entry = FileIO(part)
            _touch(entry.fileno())
            os.rename(part, path)
            return entry
        finally:
            # gone if it was renamed; what a failed one had reserved is given back by the next full count
            part.unlink(missing_ok=True)

    def _reserve(self, key: str, size: int, reserved: int) -> None:
        """Make room for ``size`` bytes of ``key``, of which ``reserved`` were reserved before."""
        if size > self.bytes:
            raise UserError(
                f"the cache in {self.folder} may hold {self.bytes} bytes, but {key} alone needs {size}. Raise "
                "`cache.bytes`; it should hold at least the files that all processes of a node read at one time."
            )
        with self._ledger() as ledger:
            # never less than what is there: written before the entry appears, corrected by every full count
            noted = ledger.read()
            used = int(noted) - reserved if noted.isdigit() else None
            if used is None or used + size > self.bytes:
                used = self._make_room(key + _PART, int(self.bytes * _LOW_WATER) - size)
            ledger.seek(0)
            ledger.write(b"%020d" % (used + size))

    def _make_room(self, own: str, target: int) -> int:
        """Evict the least recently used entries until all files but ``own`` have at most ``target`` bytes.

        Returns:
            the bytes they have then; more than ``target`` only if what others are filling has more.
        """
        entries: list[tuple[int, int, str]] = []
        total = 0
        for item in os.scandir(self.folder):
            if item.name in (own, _LEDGER):
                continue
            if item.name.endswith(_PART) and _remove_if_dead(Path(item.path)):
                continue
            try:
                status = item.stat()
            except FileNotFoundError:
                continue
            total += status.st_size
            if not item.name.endswith(_PART):
                entries.append((status.st_mtime_ns, status.st_size, item.path))
        for _, size, path in sorted(entries):
            if total <= target:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _ledger(self) -> Iterator[FileIO]:
        """The file that notes the bytes in use, locked."""
        descriptor = os.open(self.folder / _LEDGER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with FileIO(descriptor, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def cache_folder(settings: CacheSettings) -> Path:
    """Where the cache lies: the setting, else ``$HEADRACE_CACHE``, else the user's cache folder."""
    if settings.folder is not None:
        return Path(settings.folder).expanduser()
    if named := os.environ.get("HEADRACE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace"


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key) or key.endswith(_PART):
        raise ValueError(f"{key!r} can't be the key of a cache entry")
    return key


def _open_entry(path: Path) -> FileIO | None:
    try:
        entry = FileIO(path)
    except FileNotFoundError:
        return None
    _touch(entry.fileno())
    return entry


def _touch(descriptor: int) -> None:
    """Stamp the entry as just used. An explicit stamp: file systems are mounted without access times, and the
    kernel's own notion of now is too coarse to tell neighbours apart."""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


@contextmanager
def _locked(part: Path) -> Iterator[Path | None]:
    """Hold the lock of ``part``, made if missing; ``None`` if it went away while waiting: look again."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        # somebody has cleaned up the disk of the node
        part.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield part if _is_still(part, descriptor) else None
    finally:
        # said, not left to closing: a process forked meanwhile holds the same lock
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _remove_if_dead(part: Path) -> bool:
    """Remove what a killed process left; ``False`` if somebody is filling it."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(part, descriptor):
            part.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
