"""Standard output and error that a run outlives: a closed pipe or a full disk below the log stops no training."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class LastingOutput:
    """A text stream that keeps the first failure to write it in ``error`` and goes on without what it could not write.

    ``metrics.jsonl`` is the record of a run; what it prints is for whoever looks on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = self.error or error
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_output() -> None:
    """Let this process go on when nobody takes what it prints."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), LastingOutput):
            setattr(sys, name, LastingOutput(getattr(sys, name)))


def lost_output() -> str:
    """What of this process's output can't be written, in words; nothing where all goes well."""
    streams = {"standard output": sys.stdout, "standard error": sys.stderr}
    lost = [
        f"{name} can't be written ({stream.error.strerror})"
        for name, stream in streams.items()
        if isinstance(stream, LastingOutput) and stream.error
    ]
    return ", ".join(lost)
