"""``data.json`` of a run folder: what each stretch of the run's steps has read, for ``explain`` and ``when-seen``.

A stretch begins where an attempt began to read otherwise than the one before it: on another number of ranks, with
another batch, other ranges left out, or, by an explicit override, other data. A resume that goes back cuts off the
stretches that will be trained anew.
"""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import Field

from .batch_plan import BatchPlan
from .errors import UserError
from .files import publish_json
from .permutation import IntArray
from .settings import Settings, build_settings
from .stream import StreamSettings

HISTORY_FILE = "data.json"


class Stretch(Settings):
    """Steps that were read alike. Steps are counted from 0 here; metric lines name a step by how many are done."""

    first_step: int = Field(ge=0)
    first_position: int = Field(ge=0)
    end_step: int = Field(ge=0, description="Where the run was to end when the stretch began.")
    world_size: int = Field(ge=1)
    micro_batch: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    ramp: tuple[tuple[int, int], ...]
    skip_ranges: tuple[tuple[int, int], ...]
    seed: int
    stream: StreamSettings
    data_sets: dict[str, str] = Field(description="The identity of each source's data set.")

    @cached_property
    def plan(self) -> BatchPlan:
        """How positions were cut into steps."""
        return BatchPlan(self.global_batch, self.ramp, self.skip_ranges)

    def start_of(self, step: int) -> int:
        """The position at which step ``step`` begins."""
        return self.plan.advance(self.first_step, self.first_position, step)

    def positions(self, step: int) -> IntArray:
        """The positions of step ``step``, int64 [its batch], in the order in which ranks and rows take them."""
        return self.plan.positions(self.start_of(step), self.plan.batch(step))

    def step_of(self, position: int, end_step: int) -> int | None:
        """The step below ``end_step`` that takes ``position``; ``None`` for one that is skipped or not reached."""
        steps = range(self.first_step, end_step + 1)
        found = bisect.bisect_right(steps, position, key=self.start_of) - 1
        if found < 0 or steps[found] >= end_step or self._skipped(position):
            return None
        return steps[found]

    def seat(self, step: int, position: int) -> tuple[int, int]:
        """The rank and the row (over the rank's micro-batches of the step) that take ``position`` in ``step``."""
        place = int(np.searchsorted(self.positions(step), position))
        micro_step, within = divmod(place, self.world_size * self.micro_batch)
        rank, row = divmod(within, self.micro_batch)
        return rank, micro_step * self.micro_batch + row

    def _skipped(self, position: int) -> bool:
        return any(start <= position < stop for start, stop in self.skip_ranges)


class _History(Settings):
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class History:
    """The stretches of a run, in order."""

    folder: Path
    stretches: tuple[Stretch, ...]

    def of_step(self, step: int) -> Stretch:
        """The stretch that holds step ``step``.

        Raises:
            UserError: the run ends before that step, or begins after it.
        """
        begin, end = self.stretches[0].first_step, self.stretches[-1].end_step
        if not begin <= step < end:
            earlier = " What came before is in the run whose checkpoint it began with." if begin else ""
            raise UserError(
                f"the run {self.folder} has the steps {begin + 1} to {end}, not {step + 1}. Steps are named as in "
                f"metrics.jsonl.{earlier}"
            )
        return self.stretches[bisect.bisect_right(self.stretches, step, key=lambda each: each.first_step) - 1]

    def spans(self) -> list[tuple[Stretch, int]]:
        """Each stretch with the step before which it ends."""
        ends = [after.first_step for after in self.stretches[1:]]
        return list(zip(self.stretches, [*ends, self.stretches[-1].end_step], strict=True))


def read_history(folder: Path) -> History:
    """Read ``data.json`` of the run folder ``folder``.

    Raises:
        UserError: there is none, or it can't be read.
    """
    path = folder / HISTORY_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {HISTORY_FILE}, so what it has read is not known. Give the folder of a run that "
            "`pretrain train` has started (run.folder/run.name of its configuration)."
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}. Restore it from a copy, or delete it: the run then goes on without knowing "
            "what it has read so far."
        ) from error
    return History(folder, build_settings(_History, content, str(path)).stretches)


def record_stretch(folder: Path, stretch: Stretch) -> None:
    """Publish ``data.json`` with ``stretch`` as what is read from its first step on."""
    path = folder / HISTORY_FILE
    before: list[Stretch] = []
    if path.is_file() and stretch.first_step > 0:
        before = [known for known in read_history(folder).stretches if known.first_step < stretch.first_step]
        before = [_with_places_of(stretch, known) for known in before]
    if before and _goes_on(before[-1], stretch):
        stretch = stretch.model_copy(
            update={"first_step": before[-1].first_step, "first_position": before[-1].first_position}
        )
        before.pop()
    # sources as the run has them: the order of the data hangs on theirs
    publish_json(path, {"stretches": [each.model_dump(mode="json") for each in (*before, stretch)]}, sort_keys=False)


def _with_places_of(now: Stretch, before: Stretch) -> Stretch:
    """``before`` with its data sets where ``now`` has found the same ones: they may have been moved in between."""
    found = now.stream.sources
    sources = {
        name: source.model_copy(update={"path": found[name].path})
        if before.data_sets[name] == now.data_sets.get(name)
        else source
        for name, source in before.stream.sources.items()
    }
    return before.model_copy(update={"stream": before.stream.model_copy(update={"sources": sources})})


def _goes_on(before: Stretch, now: Stretch) -> bool:
    """Whether ``now`` reads what ``before`` would have read from its first step on."""
    shape = {"first_step", "first_position", "end_step"}
    same = before.model_dump(exclude=shape) == now.model_dump(exclude=shape)
    in_order = list(before.stream.sources) == list(now.stream.sources)  # the order of the data hangs on theirs
    return same and in_order and before.start_of(now.first_step) == now.first_position
