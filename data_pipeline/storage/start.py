"""Asking for the first time, at the start of a command: a storage that is down is told soon, not after the patience
that a running read has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from .errors import StorageError
from .settings import StorageSettings
from .store import open_store, scheme


@contextmanager
def impatient(settings: StorageSettings) -> Iterator[StorageSettings]:
    """``settings`` with the patience of a start, ``remote.start_seconds``, for what is asked inside.

    Raises:
        StorageError: the storage did not answer so long (``transient``); says so.
    """
    remote = settings.remote
    patience = min(remote.start_seconds, remote.deadline_seconds)
    try:
        yield settings.model_copy(update={"remote": remote.model_copy(update={"deadline_seconds": patience})})
    except StorageError as error:
        if not error.transient:
            raise
        advice = (
            "Look whether the server is up and the address is right, then start again. A start waits for `remote."
            f"start_seconds` = {remote.start_seconds:g} s (in a run's configuration `data.remote.`); reads on the way "
            "are more patient."
        )
        raise StorageError(error.root, error.name, error.start, error.reason, advice, transient=True) from error


def check_answers(roots: Iterable[str], name: str, settings: StorageSettings) -> None:
    """Ask each remote root for the size of its file ``name``; what it says, if it says something, is for others.

    Raises:
        StorageError: one of them gives no answer (``transient``).
    """
    for root in dict.fromkeys(roots):
        if scheme(root) in ("", "file", "pipe"):
            continue
        with impatient(settings) as hurried:
            try:
                open_store(root, hurried).size(name)
            except StorageError as error:
                if error.transient:
                    raise
