"""``rollbacks.json`` of a run folder: every time the run went back by itself, and the positions it leaves out since.

Published before the run goes back, so that a run which is killed on the way goes on as it would have: a resume from a
checkpoint before a range leaves the range out. What lies before a checkpoint's position stands in the checkpoint too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.files import publish_json
from data_pipeline.settings import Settings, build_settings

ROLLBACKS_FILE = "rollbacks.json"

Range = tuple[int, int]


class Rollback(Settings):
    """One return to an earlier checkpoint."""

    kind: Literal["non_finite", "spike"]
    step: int = Field(ge=1)
    """The incident's; steps count from 1."""
    resumed_step: int = Field(ge=0)
    """Of the checkpoint."""
    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    """Positions [start, stop) are left out."""
    message: str
    """What it was."""


class _Rollbacks(Settings):
    rollbacks: tuple[Rollback, ...]


def read_rollbacks(folder: Path) -> tuple[Rollback, ...]:
    """The rollbacks of the run in ``folder``, in order; no file is none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / ROLLBACKS_FILE
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}. Restore it from a copy, or delete it: the run then reads again what it left "
            "out after its newest checkpoint."
        ) from error
    return build_settings(_Rollbacks, content, str(path)).rollbacks


def record_rollback(folder: Path, rollback: Rollback) -> None:
    """Publish the file with one more rollback."""
    known = (*read_rollbacks(folder), rollback)
    publish_json(folder / ROLLBACKS_FILE, {"rollbacks": [each.model_dump(mode="json") for each in known]})


def ahead(rollbacks: tuple[Rollback, ...], position: int) -> tuple[Rollback, ...]:
    """Those whose ranges a run that stands at ``position`` has still before it, beginning there at the earliest.

    It stands within a range where the checkpoint that it goes on from was not known when the run decided to go back:
    the run folder had lost it, and the second place, which had not, did not answer then.
    """
    return tuple(
        rollback.model_copy(update={"start": max(rollback.start, position)})
        for rollback in rollbacks
        if rollback.stop > position
    )


def merged(ranges: list[Range]) -> tuple[Range, ...]:
    """The union of ranges [start, stop), ascending, without those that overlap or touch."""
    union: list[Range] = []
    for start, stop in sorted(ranges):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(stop, union[-1][1]))
        else:
            union.append((start, stop))
    return tuple(union)
