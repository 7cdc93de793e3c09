"""Ranks agree on errors: where one of them fails alone, all end for the same reason instead of waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from data_pipeline.errors import HeadraceError, UserError

from .distributed import Distributed

T = TypeVar("T")


class AgreedError(HeadraceError):
    """Every rank raises it together, with the exit code of the error that a rank had."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def attempt(action: Callable[[], T]) -> tuple[T | None, HeadraceError | None]:
    """What ``action`` returns, or the error meant for people that it ends in (one of the disk made into one)."""
    try:
        return action(), None
    except HeadraceError as error:
        return None, error
    except OSError as error:
        return None, UserError(f"{error.strerror or error} ({error.filename or 'no file named'}). Mend that first.")


def together(ranks: Distributed, action: Callable[[], T]) -> T:
    """``action`` (which communicates with nobody) on every rank; if it fails on any, all raise the same error."""
    return agreed(ranks, *attempt(action))


def agreed(ranks: Distributed, value: T | None, failure: HeadraceError | None) -> T:
    """``value`` if no rank has a failure. Collective.

    Raises:
        AgreedError: on every rank, with each different message once and the ranks it came from.
    """
    failures = ranks.gather_objects((str(failure), failure.exit_code) if failure else None)
    by_message: dict[tuple[str, int], list[int]] = {}
    for rank, item in enumerate(failures):
        if item:
            by_message.setdefault(item, []).append(rank)
    if by_message:
        parts = [
            message if len(who) == ranks.world_size or who == [0] else f"{message} (ranks {', '.join(map(str, who))})"
            for (message, _), who in by_message.items()
        ]
        raise AgreedError(" ".join(parts), max(code for _, code in by_message))
    return cast(T, value)  # nobody failed, so the action's value is there (it may be None)
