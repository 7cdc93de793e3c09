"""Settings of remote storage and of the node's cache: one block, the same for preparing and for training."""

from __future__ import annotations

from pydantic import Field

from ..settings import LONGEST_WAIT, Settings


class CacheSettings(Settings):
    """Where a node keeps what it fetched, and how much of it."""

    folder: str | None = Field(
        None,
        description="A folder on a disk of this node, shared by all its processes. None: $HEADRACE_CACHE, else "
        "headrace/ in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).",
    )
    bytes: int = Field(
        64 * 2**30, gt=0, description="Upper bound of what is kept, in bytes; the least recently used goes first."
    )


class RemoteSettings(Settings):
    """How patient and how parallel reads of remote storage are."""

    deadline_seconds: float = Field(
        300.0,
        gt=0,
        le=LONGEST_WAIT,
        description="Longest time spent on one byte range, retries included, and longest silence of a `pipe:` "
        "command, before the read fails.",
    )
    start_seconds: float = Field(
        20.0,
        gt=0,
        le=LONGEST_WAIT,
        description="Longest time that the start of a command waits for a storage to answer for the first time; never "
        "more than deadline_seconds.",
    )
    attempts: int = Field(100, ge=1, description="Most attempts for one byte range.")
    first_backoff_seconds: float = Field(
        0.1,
        ge=0,
        le=LONGEST_WAIT,
        description="Upper end of the random wait before the first retry; doubles with every further one.",
    )
    longest_backoff_seconds: float = Field(
        20.0, ge=0, le=LONGEST_WAIT, description="Upper end of the random wait before any retry."
    )
    timeout_seconds: float = Field(
        30.0, gt=0, le=LONGEST_WAIT, description="Longest silence of a connection before it is given up."
    )
    parallel: int = Field(8, ge=1, description="Concurrent range requests of one process to one root.")
    range_bytes: int = Field(
        4 * 2**20, ge=1, description="A read of more bytes than this is split into parallel requests of this size."
    )


class AccessSettings(Settings):
    """Access to files that may lie elsewhere, each read once."""

    secure: bool = Field(
        False, description="Refuse `pipe:` commands, and names that leave their root (absolute, or with `..`)."
    )
    remote: RemoteSettings = RemoteSettings()


class StorageSettings(AccessSettings):
    """Access to files that may lie elsewhere, and where this node keeps what it fetched."""

    cache: CacheSettings = CacheSettings()
