"""What a preflight asks and what it answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from data_pipeline.errors import HeadraceError

Severity = Literal["error", "warning", "info"]
Code: TypeAlias = Literal[
    "configuration", "batch", "engine", "schedule", "model", "run", "run.warning", "run.queued",
    "data", "data.missing", "data.damaged", "data.holes", "data.heldout", "data.tokens", "tokenizer",
    "resume", "resume.missing", "resume.damaged", "resume.incompatible", "resume.complete", "resume.second",
    "memory", "memory.tight", "memory.exceeded", "memory.host",
    "disk", "disk.tight", "disk.space", "disk.inodes", "disk.permission",
    "time", "time.unknown", "time.lead",
    "slurm.unreachable", "slurm.partition", "slurm.time", "slurm.nodes", "slurm.gpus", "slurm.account",
    "versions", "versions.changed", "versions.cuda",
]  # fmt: skip
"""All that there are; they are stable, programs may look for them. slurm/README.md says what each means."""


@dataclass(frozen=True)
class Finding:
    """One thing that a preflight found.

    Raises:
        ValueError: it does not say what was found, or an error or a warning not what to do.
    """

    code: Code
    severity: Severity
    cause: str
    fix: str = ""

    def __post_init__(self) -> None:
        if not self.cause or not (self.fix or self.severity == "info"):
            raise ValueError(f"a finding without a cause or a fix: {self!r}")

    def __str__(self) -> str:
        return f"{self.severity:<8}{self.code:<20}{self.cause}{f' {self.fix}' if self.fix else ''}"


def refused(code: Code, error: HeadraceError, fix: str) -> Finding:
    """An error as the run itself would end with it: its last sentence says what to do; if it has but one, ``fix``."""
    cause, dot, last = str(error).rstrip(".").rpartition(". ")
    return Finding(code, "error", f"{cause}." if dot else f"{last}.", f"{last}." if dot else fix)


@dataclass(frozen=True)
class Request:
    """A run as it is to be submitted. What is None is not known, and then not checked."""

    path: Path
    overrides: Sequence[str] = ()
    nodes: tuple[int, int] = (1, 1)
    """The least and the most that the job may get."""
    ranks_per_node: int = 1
    gpu_memory: float | None = None
    """Bytes of one GPU."""
    time_limit: float | None = None
    """Seconds of one job."""
    signal_lead: float = 300.0
    """Seconds from the request to stop to the time limit."""
    partition: str | None = None
    account: str | None = None
    gpus: bool = True
    """Ranks have a GPU each; on CPUs ``gpus_per_node`` of a partition says nothing."""
    cluster: bool = True
    """For a Slurm cluster; on one machine nothing is asked of Slurm."""

    @property
    def worlds(self) -> list[int]:
        """Every number of ranks that the run may be started on."""
        return [nodes * self.ranks_per_node for nodes in range(self.nodes[0], self.nodes[1] + 1)]


def existing(path: Path) -> Path:
    """The nearest folder above ``path`` (or itself) that is there."""
    path = Path(os.path.abspath(path))
    while not path.is_dir():
        path = path.parent
    return path


def size(count: float) -> str:
    """Bytes with three digits, in a unit of powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
