"""Whether a step's update may be made: a pure function of the step's figures and of what the run's state remembers.

All ranks see the same figures (they are reduced over them) and so decide the same, as does a run that was resumed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .robust import robust_z
from .settings import StabilitySettings

Action = Literal["skip", "rollback", "stop"]


@dataclass(frozen=True)
class Figures:
    """Of one optimizer step over all ranks, before its update."""

    loss: float
    objective: float
    gradient_norm: float
    """Before clipping."""

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.objective, self.gradient_norm)))


@dataclass(frozen=True)
class Past:
    """What the decision hangs on beside the step itself."""

    step: int
    """The step to be judged, from 1."""
    losses: Sequence[float]
    """Of the last steps whose update was made, oldest first."""
    skips: Sequence[int]
    """The last steps without an update, rising."""
    rollbacks: int
    """Of the run so far."""


@dataclass(frozen=True)
class Incident:
    """A step whose update is not made."""

    kind: Literal["non_finite", "spike"]
    action: Action
    figures: Figures
    z: float | None
    """Of a spike."""
    bound: str = ""
    """Where the action is ``stop`` because of a bound: which."""
    rerun: str = ""
    """What computing the step again has told, where that is asked for."""

    @property
    def told(self) -> str:
        figures = self.figures
        told = f"loss {figures.loss}, objective {figures.objective}, gradient norm {figures.gradient_norm}"
        return told if self.z is None else f"{told}, robust z-score of the loss {self.z:.2f}"


def judge(settings: StabilitySettings, past: Past, figures: Figures) -> Incident | None:
    """What is to be done about a step; None: its update may be made."""
    if not figures.finite:
        return _bounded(settings, past, Incident("non_finite", settings.non_finite, figures, None))
    spike = settings.spike
    if spike is None or len(past.losses) < spike.least:
        return None
    z = robust_z(figures.loss, past.losses[-spike.window :])
    return _bounded(settings, past, Incident("spike", spike.action, figures, z)) if z > spike.threshold else None


def without_checkpoint(settings: StabilitySettings, past: Past, incident: Incident) -> Incident:
    """The incident where there is nothing to go back to: its step is skipped instead, within the bounds."""
    return _bounded(settings, past, replace(incident, action="skip"))


def _bounded(settings: StabilitySettings, past: Past, incident: Incident) -> Incident:
    if incident.action == "rollback" and past.rollbacks >= settings.max_rollbacks:
        bound = f"{past.rollbacks} rollbacks were made, and stability.max_rollbacks = {settings.max_rollbacks}"
        return replace(incident, action="stop", bound=bound)
    if incident.action != "skip":
        return incident
    before = set(past.skips)
    row = next(count for count in itertools.count() if past.step - 1 - count not in before)
    within = sum(past.step - settings.skip_window < step for step in past.skips)
    if row >= settings.max_skips_in_row:
        bound = f"{row} steps before it had no update, and stability.max_skips_in_row = {settings.max_skips_in_row}"
    elif within >= settings.max_skips:
        bound = (
            f"{within} of the {settings.skip_window} steps up to it had no update, and stability.max_skips = "
            f"{settings.max_skips}"
        )
    else:
        return incident
    return replace(incident, action="stop", bound=bound)
