"""What the files of a run folder say, in the shape the page needs. Any of them may be short or absent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError

from ..monitor.attempts import ATTEMPTS_FILE, Attempt, read_attempts
from ..monitor.metrics import METRICS_FILE, read_metrics

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Run:
    """A run folder as read: ``steps``, ``evaluations`` and ``events`` are the three kinds of metric line, in order."""

    name: str
    config: dict[str, Any]
    config_text: str
    attempts: list[Attempt]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def section(self, name: str) -> dict[str, Any]:
        """One section of the configuration; empty when it is absent."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    @cached_property
    def loss_unit(self) -> str:
        """Of the losses in the lines: nats, unless the run's loss is no likelihood, whose name it then is."""
        loss = self.section("objective").get("loss")
        kind = loss.get("kind") if isinstance(loss, dict) else loss
        return "nats" if kind in (None, "cross_entropy") else str(kind)

    @cached_property
    def last_step(self) -> int:
        """Optimizer steps done as far as any file knows; 0 when none was logged."""
        logged: list[int] = [line["step"] for line in (*self.steps, *self.evaluations, *self.events)]
        stopped = [attempt.last_step for attempt in self.attempts[-1:] if attempt.last_step is not None]
        return max([0, *logged, *stopped])

    @cached_property
    def total_steps(self) -> int | None:
        """Optimizer steps the configuration asks for, or None when it does not say."""
        training, data = self.section("training"), self.section("data")
        if isinstance(steps := training.get("steps"), int):
            return steps
        tokens, batch, length = training.get("tokens"), training.get("global_batch"), data.get("seq_len")
        if isinstance(tokens, int) and isinstance(batch, int) and isinstance(length, int):
            return -(-tokens // (batch * length))
        return None

    @cached_property
    def last_seen(self) -> float | None:
        """Unix time of the newest line of any file: the last sign of life of a run that recorded no stop."""
        times = [line["time"] for line in (*self.steps, *self.evaluations, *self.events) if "time" in line]
        times += [attempt.stopped or attempt.started for attempt in self.attempts]
        return max(times, default=None)

    @cached_property
    def resumes(self) -> list[tuple[int, Attempt]]:
        """Every attempt after the first that trained, with the step it continued from."""
        return [(attempt.first_step - 1, attempt) for attempt in self.attempts[1:] if attempt.trained]

    def column(self, key: str) -> tuple[list[int], list[float]]:
        """Steps [n] and values [n] of the step lines that have the number ``key``; NaN and infinities are kept."""
        return column(self.steps, key)

    def names(self, prefix: str) -> list[str]:
        """What follows ``prefix`` in the keys of the step and evaluation lines, sorted."""
        keys = {key for line in (*self.steps, *self.evaluations) for key in line if key.startswith(prefix)}
        return sorted(key.removeprefix(prefix) for key in keys)

    def seconds_of(self, attempt: Attempt) -> float | None:
        """How long ``attempt`` ran; without a recorded stop, until its last surviving line."""
        if attempt.stopped is not None:
            return attempt.stopped - attempt.started
        later = [other.started for other in self.attempts if other.number > attempt.number]
        end = min(later, default=math.inf)
        times = [line["time"] for line in self.steps if attempt.started <= line.get("time", -math.inf) < end]
        return max(times) - attempt.started if times else None

    def lost_steps(self, attempt: Attempt) -> int | None:
        """Steps of ``attempt`` that a later one had to do again; None while none has trained after it.

        A later attempt that ended before its first step may still have cut the lost lines off the metrics.
        """
        later = [other for other in self.attempts if other.number > attempt.number]
        next_trained = next((place for place, other in enumerate(later) if other.trained), None)
        if next_trained is None:
            return None
        if not attempt.trained:
            return 0
        known = 0 if attempt.last_step is None else attempt.last_step - later[next_trained].first_step + 1
        return max(0, known, *(other.lost_steps for other in later[: next_trained + 1]))


def column(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps [n] and values [n] of those ``lines`` in which ``key`` is a number."""
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: the folder is no run folder, or one of its files is damaged.
    """
    config_path = folder / CONFIG_FILE
    if not any((folder / name).is_file() for name in (CONFIG_FILE, ATTEMPTS_FILE, METRICS_FILE)):
        raise UserError(
            f"{folder} is not a run folder: it holds none of {CONFIG_FILE}, {ATTEMPTS_FILE}, {METRICS_FILE}. "
            "Give the folder of one run (run.folder/run.name of its configuration)."
        )
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise UserError(f"{config_path} is not valid YAML: {' '.join(str(error).split())}. Mend it.") from error
    config = config if isinstance(config, dict) else {}
    lines = read_metrics(folder)
    for number, line in enumerate(lines, start=1):
        if type(line.get("step")) is not int:
            raise UserError(f"{folder / METRICS_FILE}, line {number}: has no whole-numbered 'step'. Mend or delete it.")
    run_section = config.get("run")
    return Run(
        name=str(run_section.get("name") if isinstance(run_section, dict) else folder.resolve().name),
        config=config,
        config_text=config_text,
        attempts=read_attempts(folder),
        steps=[line for line in lines if "event" not in line and "evaluation" not in line],
        evaluations=[line for line in lines if "evaluation" in line],
        events=[line for line in lines if "event" in line],
    )
