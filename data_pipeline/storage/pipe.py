"""The output of shell commands as files: every byte delivered, the exit status checked after the last one.

The shell is bash with ``pipefail`` where there is one, so that ``curl ... | gunzip`` fails when curl does.
"""

from __future__ import annotations

import hashlib
import os
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from threading import Event
from typing import IO, BinaryIO

from ..errors import UserError
from .errors import StorageError, TransientError
from .retries import Deadline
from .settings import StorageSettings
from .store import PIPE, Store

_PIECE = 2**20
_STDERR_TAIL = 400
_LOOK_SECONDS = 0.5


class PipeStore(Store):
    """Files that a command prints. Not seekable: whole files only."""

    ranges = False

    def __init__(self, root: str, settings: StorageSettings) -> None:
        refuse_if_secure(root, settings)
        self._command = root.removeprefix(PIPE)
        if "{}" not in self._command:
            raise UserError(
                f"the root {root!r} has no {{}} where the name of a file is to stand. "
                "Write it as `pipe:COMMAND with {}`, for example `pipe:ssh host cat /data/{}`."
            )
        super().__init__(root, root, settings)

    def size(self, name: str) -> int:
        raise self._not_seekable(name)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        raise self._not_seekable(name)

    def read(self, name: str) -> bytes:
        self._here()
        return self._retried(name, 0, None, lambda until: b"".join(self._run(name)))

    def stream(self, name: str, size: int | None = None) -> Iterator[bytes]:
        done = 0
        try:
            with closing(self._run(name)) as pieces:
                for content in pieces:
                    yield content
                    done += len(content)
        except TransientError as error:
            raise failed(self.root, name, done, error) from error
        self._check_size(name, done, size)

    def fetch(self, name: str, to: BinaryIO, size: int | None = None) -> int:
        """As of every store. A command that fails is run again; its output is taken from where the last run broke
        off, once the bytes before are known (by SHA-256) to be those already delivered."""
        self._here()
        delivered = hashlib.sha256()
        done = 0

        def attempt(until: Deadline) -> None:
            nonlocal done
            with closing(self._run(name)) as pieces:
                for content in self._skipped(name, pieces, done, delivered.digest()):
                    to.write(content)
                    delivered.update(content)
                    done += len(content)

        self._retried(name, 0, None, attempt)
        self._check_size(name, done, size)
        return done

    def _run(self, name: str) -> Generator[bytes, None, None]:
        # replaced, not formatted: commands are full of other braces
        command = self._command.replace("{}", shlex.quote(self._checked(name)))
        return command_output(command, self.settings.remote.deadline_seconds, self._retried.abandoned)

    def _skipped(self, name: str, pieces: Iterator[bytes], skip: int, digest: bytes) -> Iterator[bytes]:
        """``pieces`` without their first ``skip`` bytes, which must have this SHA-256."""
        repeated = hashlib.sha256()
        same = True
        for content in pieces:
            before, after = content[:skip], content[skip:]
            repeated.update(before)
            skip -= len(before)
            same = skip > 0 or repeated.digest() == digest
            if not same:
                break
            if after:
                yield after
        if skip or not same:
            raise StorageError(self.root, name, 0, "a second run printed other bytes than the first", COMMAND_ADVICE)

    def _check_size(self, name: str, done: int, size: int | None) -> None:
        if size is not None and done != size:
            reason = f"the command ended well after {done} bytes, but the file has {size}"
            raise StorageError(self.root, name, min(done, size), reason, COMMAND_ADVICE)

    def _not_seekable(self, name: str) -> UserError:
        return UserError(
            f"{name} of the root {self.root} can only be read whole: the output of a command has no size and no "
            "byte ranges. Read it through the cache, or give an http(s)://, s3:// or gs:// root."
        )


COMMAND_ADVICE = "Run the command by hand to see what it does."


def failed(root: str, name: str, start: int, error: TransientError) -> StorageError:
    """What a broken command means to a reader that can't run it again."""
    return StorageError(root, name, start, str(error), COMMAND_ADVICE, transient=True)


def refuse_if_secure(url: str, settings: StorageSettings) -> None:
    """Raise :class:`UserError` if ``url`` is a command and commands are forbidden."""
    if settings.secure:
        raise UserError(
            f"{url!r} runs a shell command, which the setting `secure` forbids. "
            "Set secure to false if you trust it, or give a path, http(s)://, s3:// or gs://."
        )


def command_output(
    command: str, silence_seconds: float, abandoned: Event | None = None
) -> Generator[bytes, None, None]:
    """What a shell command prints, piece by piece. Closing the iterator kills the command and all it started.

    Args:
        command: for the shell. silence_seconds: how long it may print nothing.
        abandoned: ends it early when it is set.

    Raises:
        TransientError: after all bytes: the command ended with an error, or printed nothing for so long.
    """
    bash = shutil.which("bash")
    shell = [bash, "-o", "pipefail", "-c", command] if bash else ["/bin/sh", "-c", command]
    with tempfile.TemporaryFile() as errors:
        # a group of its own, so that closing reaches what the shell started, too
        process = subprocess.Popen(
            shell, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert process.stdout is not None
        try:
            yield from _pieces(process.stdout.fileno(), silence_seconds, abandoned or Event())
            try:
                status = process.wait(silence_seconds)
            except subprocess.TimeoutExpired:
                raise TransientError(
                    f"the command closed its output but still ran {silence_seconds:g} s later"
                ) from None
            if status:
                how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
                raise TransientError(f"the command {how}{_said(errors)}")
        finally:
            process.stdout.close()
            _kill(process)


def _pieces(descriptor: int, silence_seconds: float, abandoned: Event) -> Iterator[bytes]:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        silent_until = time.monotonic() + silence_seconds
        while not poll.poll(1000 * min(_LOOK_SECONDS, silence_seconds)):
            if abandoned.is_set():
                raise TransientError("nobody waits for what the command prints any more")
            if time.monotonic() >= silent_until:
                raise TransientError(f"the command printed nothing for {silence_seconds:g} s")
        content = os.read(descriptor, _PIECE)
        if not content:
            return
        yield content


def _kill(process: subprocess.Popen[bytes]) -> None:
    # once it was waited for, its number may belong to somebody else
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _STDERR_TAIL))
    text = " ".join(errors.read().decode(errors="replace").split())
    return f" and said: {text}" if text else ""
