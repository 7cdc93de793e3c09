"""Files that are complete or invisible (law 4): written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def fsync_folder(folder: Path) -> None:
    """Make the entries of ``folder`` (a rename, a new file) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path`` only when the body has ended without an error.

    The temporary name carries the host and the process id, so two writers never share one; a body that raises
    leaves nothing behind. Errors of the disk (``OSError``) pass through.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: a reader sees the old file or the whole new one."""
    with publish(path) as handle:
        handle.write(content)


def publish_json(path: Path, content: Any, sort_keys: bool = True) -> None:
    """Write ``content`` as indented JSON; with sorted keys, so that equal content is equal bytes, unless the order of
    a mapping means something."""
    publish_bytes(path, (json.dumps(content, indent=2, sort_keys=sort_keys) + "\n").encode())


def sha256_file(path: Path) -> str:
    """The hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
