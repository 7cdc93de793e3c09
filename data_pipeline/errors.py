"""The one exception a user is meant to read, and how a command ends with it.

Every message is one paragraph that says what is wrong, where, and what to do. Exit codes are part of the
interface (launchers decide on them whether to start a run again)::

    0   done
    2   the user's configuration or data: starting again would fail again
    75  stopped on request after saving: start me again
    1   anything else: a crash
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


class HeadraceError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what a command ends with."""

    exit_code = EXIT_CRASH


class UserError(HeadraceError):
    """The configuration or the data is wrong: says what, where and what to do; never worth a retry."""

    exit_code = EXIT_USER_ERROR


class DataError(UserError):
    """Stored data does not hold what its manifest or checksum says."""


_ENDINGS: list[Callable[[], None]] = []


def at_the_end(ending: Callable[[], None]) -> Callable[[], None]:
    """Have ``ending`` called when a command ends, however it does, before the interpreter waits for threads."""
    _ENDINGS.append(ending)
    return ending


def run_command(app: Callable[[], object]) -> int:
    """Run ``app`` and translate the errors meant for people into one paragraph on stderr and an exit code.

    Anything that is not a :class:`HeadraceError` keeps its traceback: it is a crash, and the traceback is what
    somebody will need.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # text of any language on a terminal of one: escapes in place of a crash
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result = app()
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        for ending in _ENDINGS:
            ending()
    return result if isinstance(result, int) else EXIT_DONE
