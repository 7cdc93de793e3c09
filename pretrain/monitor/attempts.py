"""``attempts.jsonl``: one line a start and one a stop; launchers read here why a run ended.

torchrun hands no worker's exit code on, and a killed process writes none: an attempt with a start and no stop was
killed (or still runs).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from data_pipeline.errors import UserError

from . import lines

Reason: TypeAlias = Literal["done", "stopped", "user_error", "crash", "non_finite", "unstable", "rolled_back"]

ATTEMPTS_FILE = "attempts.jsonl"
_LEADING = ("event", "attempt", "time")


@dataclass(frozen=True)
class Attempt:
    """One start of the training program. Steps count from 1; times are Unix seconds.

    ``first_step`` is the first step this attempt trained; ``lost_steps`` how many steps of the attempts before it had
    to be done again. The fields from ``stopped`` on are None when no stop was recorded.
    """

    number: int
    started: float
    hosts: tuple[str, ...]
    world_size: int
    versions: dict[str, str]
    first_step: int
    resumed_from: str | None
    superseded_lines: int
    lost_steps: int
    initial_weights: dict[str, str] | None
    """``path`` and ``sha256`` of ``model.weights_from``, where the attempt began with those."""
    masks: tuple[dict[str, str], ...]
    """The same of every ``mask_from`` of pruned linear layers."""
    topology_changes: tuple[str, ...]
    """How the topology differs from that of the checkpoint resumed from, as ``key: old -> new``."""
    stopped: float | None = None
    last_step: int | None = None
    reason: Reason | None = None
    signal: str | None = None
    exit_code: int | None = None
    message: str = ""
    guilty: tuple[int, ...] = ()
    """The ranks whose fault a hang was, as far as that is certain."""

    @property
    def trained(self) -> bool:
        """Whether it did a step, as far as is known: an attempt may end before the first one."""
        return self.last_step is None or self.last_step >= self.first_step

    @property
    def ended(self) -> str:
        """Why it ended, in words: ``"done"``, ``"stopped (SIGTERM)"``, ``"killed (no stop was recorded)"``, ..."""
        if self.reason is None:
            return "killed (no stop was recorded)"
        return f"{self.reason.replace('_', '-')} ({self.signal})" if self.signal else self.reason.replace("_", "-")


class AttemptsLog:
    """Appends to ``RUN/attempts.jsonl``: whole lines, on the disk before the call returns. Rank 0 only.

    Raises:
        UserError: the file holds a damaged line, or can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ATTEMPTS_FILE
        try:
            lines.mend(self.path)
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written: {error.strerror or error}. Choose another run.folder or mend it."
            ) from error
        self._starts = len(read_attempts(folder))

    def start(
        self,
        *,
        hosts: Sequence[str],
        world_size: int,
        versions: Mapping[str, str],
        first_step: int,
        resumed_from: str | None,
        initial_weights: Mapping[str, str] | None = None,
        masks: Sequence[Mapping[str, str]] = (),
        topology_changes: Sequence[str] = (),
        superseded_lines: int = 0,
        lost_steps: int = 0,
    ) -> int:
        """Record a start and return the attempt's number, counted from 1."""
        self._starts += 1
        self._append(
            {
                "event": "start",
                "attempt": self._starts,
                "hosts": list(hosts),
                "world_size": world_size,
                "versions": dict(versions),
                "first_step": first_step,
                "resumed_from": resumed_from,
                "initial_weights": dict(initial_weights) if initial_weights else None,
                "masks": [dict(each) for each in masks],
                "topology_changes": list(topology_changes),
                "superseded_lines": superseded_lines,
                "lost_steps": lost_steps,
            }
        )
        return self._starts

    def stop(
        self,
        attempt: int,
        *,
        last_step: int,
        reason: Reason,
        exit_code: int,
        message: str = "",
        signal: str | None = None,
        guilty: Sequence[int] = (),
    ) -> None:
        """Record why ``attempt`` ends; ``signal`` names the signal of a stop on request (``"SIGTERM"``), ``guilty`` the
        ranks that a hang is the fault of."""
        if reason not in get_args(Reason):
            raise ValueError(f"reason {reason!r} is not one of {', '.join(get_args(Reason))}")
        line = {"event": "stop", "attempt": attempt, "last_step": last_step, "reason": reason}
        blame = {"guilty": list(guilty)} if guilty else {}
        self._append({**line, "signal": signal, "exit_code": exit_code, "message": message, **blame})

    def _append(self, line: dict[str, Any]) -> None:
        lines.append(self.path, lines.encode({**line, "time": time.time()}, _LEADING), durable=True)


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts of a run in order, each start joined with its stop; no file is no attempts.

    Raises:
        UserError: a line is damaged, lacks a field, or is a stop without its start (the message has its number).
    """
    path = folder / ATTEMPTS_FILE
    attempts: dict[int, Attempt] = {}
    for number, line in enumerate(lines.read(path).objects, start=1):
        try:
            if line["event"] == "start":
                attempts[line["attempt"]] = _started(line)
            else:
                attempts[line["attempt"]] = replace(
                    attempts[line["attempt"]],
                    stopped=line["time"],
                    last_step=line["last_step"],
                    reason=line["reason"],
                    signal=line["signal"],
                    exit_code=line["exit_code"],
                    message=line["message"],
                    guilty=tuple(line.get("guilty", ())),
                )
        except KeyError as error:
            raise UserError(
                f"{path}, line {number}: a start lacks a field or a stop lacks its start ({error} is missing). "
                "Mend or delete that line."
            ) from error
    return list(attempts.values())


def _started(line: dict[str, Any]) -> Attempt:
    return Attempt(
        number=line["attempt"],
        started=line["time"],
        hosts=tuple(line["hosts"]),
        world_size=line["world_size"],
        versions=line["versions"],
        first_step=line["first_step"],
        resumed_from=line["resumed_from"],
        superseded_lines=line["superseded_lines"],
        lost_steps=line["lost_steps"],
        initial_weights=line["initial_weights"],
        masks=tuple(line["masks"]),
        topology_changes=tuple(line["topology_changes"]),
    )
