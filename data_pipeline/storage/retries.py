"""Attempts repeated with exponential backoff, full jitter and a deadline; every repetition counted, some logged.

The waits are drawn uniformly from 0 to a bound that doubles ("full jitter": Brooker, "Exponential Backoff And
Jitter", AWS Architecture Blog 2015), so that many ranks that failed together do not come back together.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

import tenacity

from ..errors import at_the_end
from .errors import AbandonedError, StorageError, TransientError
from .settings import RemoteSettings

logger = logging.getLogger("headrace.storage")
Result = TypeVar("Result")
_LOG_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Deadline:
    """How long an attempt may go on: to a time (``time.monotonic()``), as long as somebody waits for it."""

    at: float
    abandoned: Event

    def left(self) -> float:
        """Seconds; below 0 when it is over."""
        return self.at - time.monotonic()

    def passed(self) -> bool:
        return self.abandoned.is_set() or self.left() < 0


class Retries:
    """Repeats attempts on one root. Threads may share it.

    Attributes:
        abandoned: set when nobody waits any more for what is being read now.
    """

    def __init__(self, root: str, settings: RemoteSettings) -> None:
        self.root, self.settings = root, settings
        self.count = 0
        self._next_line = 0.0
        self._lock = threading.Lock()
        # tenacity's own jitter draws from the global generator, whose state a checkpoint keeps: a retry would change it
        self._random = random.Random()
        self.abandoned = Event()
        _ALIVE.add(self)

    def abandon(self, for_ever: bool = False) -> None:
        """End the waits between attempts, and what an attempt waits for as soon as it looks."""
        before = self.abandoned
        if not for_ever:
            self.abandoned = Event()
        before.set()

    def __call__(self, name: str, start: int, stop: int | None, attempt: Callable[[Deadline], Result]) -> Result:
        """The result of ``attempt``, repeated as long as it raises :class:`TransientError`.

        Args:
            name: the file. start, stop: the bytes asked for, for the log (``stop`` ``None``: to the end).
            attempt: called with the time beyond which it must not go on.

        Raises:
            StorageError: the attempts or the time are used up; names the last cause. Or nobody waits any more.
        """
        began, abandoned = time.monotonic(), self.abandoned
        until = Deadline(began + self.settings.deadline_seconds, abandoned)
        # built per call: a Retrying keeps the state of the call that runs
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_after_attempt(self.settings.attempts)
            | tenacity.stop_before_delay(self.settings.deadline_seconds),
            wait=self._wait,
            sleep=tenacity.sleep_using_event(abandoned),
            before_sleep=lambda state: self._note(name, start, stop, state),
            reraise=True,
        )
        tries = 0

        def counted() -> Result:
            nonlocal tries
            if abandoned.is_set():
                advice = "What it was read for has ended."
                raise AbandonedError(self.root, name, start, "nobody waits for it any more", advice, transient=True)
            tries += 1
            return attempt(until)

        try:
            return retrying(counted)
        except TransientError as error:
            most, patience = self.settings.attempts, self.settings.deadline_seconds
            late = f"; the next one would come after the {patience:g} s it may take" if tries < most else ""
            reason = f"{error} (attempt {tries} of {most}, {time.monotonic() - began:.1f} s{late})"
            raise StorageError(
                self.root,
                name,
                start,
                reason,
                "Look whether the storage is well and start again, or raise `remote.attempts` and "
                "`remote.deadline_seconds` (in a run's configuration `data.remote.`).",
                transient=True,
            ) from error

    def _wait(self, state: tenacity.RetryCallState) -> float:
        settings = self.settings
        bound = settings.first_backoff_seconds * 2.0 ** min(state.attempt_number - 1, 60)
        drawn = self._random.uniform(0.0, min(bound, settings.longest_backoff_seconds))
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after if isinstance(error, TransientError) else 0.0
        return max(drawn, min(asked, settings.longest_backoff_seconds))

    def _note(self, name: str, start: int, stop: int | None, state: tenacity.RetryCallState) -> None:
        with self._lock:
            self.count += 1
            now = time.monotonic()
            if now < self._next_line:
                return
            self._next_line = now + _LOG_EVERY_SECONDS
            count = self.count
        logger.warning(
            "%s/%s, bytes %d to %s: %s (attempt %d of %d); trying again, as %d time(s) so far. "
            "Next such line in %d s at the earliest.",
            self.root.rstrip("/"),
            name,
            start,
            "the end" if stop is None else stop,
            state.outcome.exception() if state.outcome else None,
            state.attempt_number,
            self.settings.attempts,
            count,
            _LOG_EVERY_SECONDS,
        )


_ALIVE: weakref.WeakSet[Retries] = weakref.WeakSet()


@at_the_end
def _abandon_all() -> None:
    """The interpreter waits for the threads that read ahead: not until the deadlines of a server that is gone."""
    for retries in list(_ALIVE):
        retries.abandon(for_ever=True)
