"""Tasks that share the work of one `prepare`: who does what, and that no two do the same at the same time.

What is claimed is a lock that dies with its process (flock), so a killed task leaves no claim behind. All machines must
share a file system whose flock holds across them (NFS 4, Lustre mounted with ``flock``, GPFS, CephFS).
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from ..errors import UserError

PATIENCE_SECONDS = 5.0
"""How long a claim is waited for: a worker outlives its killed parent by a moment."""


class Item(Protocol):
    """A piece of work with a result that is published last."""

    @property
    def record(self) -> Path:
        """Exists when the work is done."""

    @property
    def label(self) -> str:
        """What it is, for messages, and unique: ``part 000003``."""


ItemType = TypeVar("ItemType", bound=Item)


@dataclass(frozen=True)
class Share:
    """Task ``task`` of ``tasks`` (counted from 0), which does every ``tasks``-th item.

    Raises:
        UserError: there is no such task.
    """

    task: int = 0
    tasks: int = 1

    def __post_init__(self) -> None:
        if self.tasks < 1 or not 0 <= self.task < self.tasks:
            raise UserError(
                f"task {self.task} of {self.tasks} tasks does not exist. Count tasks from 0 to tasks - 1 "
                "(--task 0 --tasks 1 is a plain prepare)."
            )

    def of(self, items: Sequence[ItemType]) -> Sequence[ItemType]:
        """The items of this task."""
        return items[self.task :: self.tasks]

    def __str__(self) -> str:
        return f"task {self.task} of {self.tasks}"


@dataclass(frozen=True)
class Claimed(Generic[ItemType]):
    """``function`` for items that are not done, each claimed while it runs; may be sent to another process."""

    function: Callable[[ItemType], None]
    folder: Path
    share: Share

    def __call__(self, item: ItemType) -> None:
        """Do the item, unless it has its record.

        Raises:
            UserError: another task is at it; names the holder.
        """
        if item.record.exists():
            return
        with claim(self.folder, item.label, self.share):
            if not item.record.exists():
                self.function(item)


@contextmanager
def claim(folder: Path, label: str, share: Share, wait: bool = False) -> Iterator[None]:
    """Hold what ``label`` names; ``wait`` for as long as somebody else does, or only for ``PATIENCE_SECONDS``.

    Raises:
        UserError: another process holds it; names that one. Or the file system has no locks.
    """
    path = folder / label.replace(" ", "-")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (descriptor := _try_lock(path)) is None:
        if not wait and time.monotonic() > deadline:
            raise UserError(
                f"{label} is being done by {_holder(path)}; this is {share} (host {socket.gethostname()}, process "
                f"{os.getpid()}). Give each running task a --task of its own and all of them the same --tasks."
            )
        time.sleep(0.02)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{share} (host {socket.gethostname()}, process {os.getpid()})".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except BlockingIOError:
        pass
    except FileNotFoundError:  # the holder before has just removed it
        pass
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(
                f"the file system of {path.parent} has no locks ({error.strerror}), so tasks can't share work there. "
                "Give an `output` on another one, or mount it with flock."
            ) from error
        raise
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "another process"
    except FileNotFoundError:
        return "another process"
