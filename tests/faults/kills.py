"""Seeded kills: runs of a tiny model, killed again and again, have to end as the undisturbed run of their kind."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpoint import read_manifest
from tests.system.runs import Runs

from .forked import RANKS, attempt
from .places import arm, draw_kill

STEPS = 12
KILLS_OF_A_RUN = 6
STAGES = (0, 1, 2, 3)


@dataclass
class Tally:
    """What came of the kills so far, by place and ZeRO stage."""

    kills: Counter[tuple[str, int]] = field(default_factory=Counter)
    runs: int = 0
    equal: int = 0
    missed: int = 0
    """Kills whose moment never came: the attempt ended before."""
    problems: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(self.kills.values())


class Kills:
    """Runs below one folder.

    Args:
        runs: where, and their data.
        seed: of all draws.
    """

    def __init__(self, runs: Runs, seed: int) -> None:
        self.runs = runs
        self.random = random.Random(seed)
        self.tally = Tally()
        self._references: dict[int, Any] = {}

    def config(self, name: str, stage: int, asynchronous: bool = False, **sections: dict[str, Any]) -> Path:
        saves = {"every_steps": 3, "keep_last": 2, "asynchronous": asynchronous}
        return self.runs.config(
            name,
            engine={"zero_stage": stage},
            checkpoint=saves,
            training={"steps": STEPS},
            evaluation={"every_steps": 6, "sequences": 8},
            **sections,
        )

    def outcome(self, name: str) -> Any:
        """What has to be the same: every tensor of the last checkpoint, every line of metrics but for the clock."""
        self.runs.state_hashes(name, STEPS)
        files = read_manifest(self.runs.run_folder(name) / "checkpoints" / f"step_{STEPS:09d}")
        assert files is not None
        lines = [line for line in self.runs.metrics(name) if line.get("event") != "damaged_checkpoint"]
        return {file.path: file.sha256 for file in files if file.path.endswith((".pt", "layout.json"))}, lines

    def reference(self, stage: int) -> Any:
        if stage not in self._references:
            done = attempt(self.config(f"reference{stage}", stage))
            assert done.codes == (0,) * RANKS, done.log
            self._references[stage] = self.outcome(f"reference{stage}")
        return self._references[stage]

    def one_run(self, most_kills: int) -> None:
        """One run, killed up to ``most_kills`` times and then left alone."""
        number, stage = self.tally.runs, self.random.choice(STAGES)
        name, asynchronous = f"run{number}", self.random.random() < 0.5
        config = self.config(name, stage, asynchronous)
        kind = f"{name} (ZeRO {stage}, {'asynchronous' if asynchronous else 'synchronous'} saves)"
        self.tally.runs += 1
        expected = self.reference(stage)
        for turn in range(most_kills + 1):
            kill = draw_kill(self.random, RANKS) if turn < most_kills else None
            ended = attempt(config, prepare=lambda rank, kill=kill: arm(kill) if kill and kill.rank == rank else None)
            if kill and ended.killed:
                self.tally.kills[kill.place, stage] += 1
                continue
            self.tally.missed += kill is not None
            if ended.codes != (0,) * RANKS:
                self.tally.problems.append(
                    f"{kind}: after {turn} kills it ended with {ended.codes}: {ended.log[-3000:]}"
                )
                return
            break
        if self.outcome(name) == expected:
            self.tally.equal += 1
        else:
            self.tally.problems.append(f"{kind}: its end differs from the undisturbed run's")
