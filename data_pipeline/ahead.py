"""Things made ahead of their use by a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")

_PATIENCE_SECONDS = 5.0
"""For the thread to end: whoever closes may have been told to, and be killed soon."""
_LOOK_SECONDS = 1.0


class Ahead(Generic[Made]):
    """A daemon thread that calls ``make`` and keeps up to ``depth`` results ready.

    The first exception ends the thread; it is handed out after the results made before it, and at every call from then
    on (the end of the data is such an exception too).
    """

    def __init__(self, make: Callable[[], Made], depth: int) -> None:
        self._make, self._depth = make, depth
        self._ready: deque[Made] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="step-loader", daemon=True)
        self._thread.start()

    def take(self, give_up: Callable[[], bool]) -> Made | None:
        """The next result, in the order in which they were made; ``None`` when ``give_up`` says so while none is ready.

        ``give_up`` is asked about once a second.
        """
        with self._changed:
            while not self._changed.wait_for(lambda: self._ready or self._failure or self._closed, _LOOK_SECONDS):
                if give_up():
                    return None
            if self._closed:
                raise RuntimeError("the step loader is closed")
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        """End the thread, after the result it is at; one that is stuck in there is left to the end of the process."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(_PATIENCE_SECONDS)

    def is_running(self) -> bool:
        """Whether the thread may still make something: it was not closed, or is stuck."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                made = self._make()
                with self._changed:
                    self._ready.append(made)
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the next result
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            return not self._closed
