"""Data that a rank can't read: all ranks learn of it at the same place, so that they can save what is done and end."""

from __future__ import annotations

import socket

from data_pipeline.errors import EXIT_CRASH, HeadraceError

from .distributed import Distributed

UNREADABLE = (HeadraceError, OSError)
"""What reading data may end in: damage, a server that can't be reached, the disk."""


class UnreadableDataError(HeadraceError):
    """Every rank raises it together, with the exit code that the error of the rank has by itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def agree_on_reading(ranks: Distributed, failure: Exception | None) -> None:
    """Go on if no rank has a failure. Collective.

    Args:
        ranks: this process among its peers.
        failure: why this rank could not read what it needs; one of :data:`UNREADABLE`.

    Raises:
        UnreadableDataError: on every rank; names each rank that failed, with its host, where there are several ranks.
    """
    code = failure.exit_code if isinstance(failure, HeadraceError) else EXIT_CRASH
    where = f"rank {ranks.rank} on {socket.gethostname()}: " if ranks.world_size > 1 else ""
    told = ranks.gather_objects((f"{where}{str(failure).rstrip('.')}.", code) if failure else None)
    if found := [each for each in told if each]:
        raise UnreadableDataError(" ".join(message for message, _ in found), max(code for _, code in found))
