"""A request to stop: a signal sets a flag, the ranks agree on it at the end of the step."""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE_SECONDS = 5.0
"""How long a rank that was asked to stop waits for the data of one more step."""


class StopRequest:
    """Catches SIGTERM, SIGINT and SIGUSR1 from now on; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._received: set[signal.Signals] = set()
        self._since: float | None = None
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self._received:
            raise KeyboardInterrupt
        self._received.add(signal.Signals(number))
        self._since = self._since or time.monotonic()

    def overdue(self) -> bool:
        """Whether this rank was asked to stop some seconds ago: the end of a usual step would have come by now."""
        return self._since is not None and time.monotonic() - self._since > PATIENCE_SECONDS

    @property
    def flags(self) -> list[bool]:
        """One flag for each of ``SIGNALS``: this rank has received it."""
        return [number in self._received for number in SIGNALS]


def names(flags: tuple[bool, ...]) -> list[str]:
    """The names of the signals whose flags are set."""
    return [number.name for number, flag in zip(SIGNALS, flags, strict=True) if flag]
