"""The learning rate as a pure function of the step: nothing to save, nothing to restore.

Step s is the update that comes after s others. With w warm-up steps and n steps in all, steps 0 .. w-1 have
peak (s + 1) / w and step w has the peak again; the minimum is what step n, the first after the run, would have, so
that no step of the run is wasted on a rate of 0.
"""

from __future__ import annotations

import math

from data_pipeline.errors import UserError

from .settings import ScheduleSettings

DEFAULT_MINIMUM_RATIO = 0.1


def check_schedule(settings: ScheduleSettings, total_steps: int) -> None:
    """Refuse a schedule that does not fit into a run of ``total_steps`` optimizer steps.

    Raises:
        UserError: warm-up and decay together are longer than the run.
    """
    decay_steps = settings.decay_steps or 0
    if settings.warmup_steps + decay_steps <= total_steps:
        return
    decay = f" plus schedule.decay_steps {decay_steps}" if decay_steps else ""
    raise UserError(
        f"schedule.warmup_steps {settings.warmup_steps}{decay} is more than the run's {total_steps} optimizer steps. "
        "Shorten the schedule or lengthen the run (training.steps, training.tokens)."
    )


def learning_rate(step: int, total_steps: int, settings: ScheduleSettings, peak: float) -> float:
    """The learning rate of update ``step`` (from 0) of a run of ``total_steps``, for which ``settings`` is checked.

    From ``total_steps`` on it stays at the minimum. Cosine: SGDR (arXiv 1608.03983) without restarts; WSD: MiniCPM
    (arXiv 2404.06395) with the linear decay of arXiv 2405.18392.
    """
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    minimum = DEFAULT_MINIMUM_RATIO if settings.minimum_ratio is None else settings.minimum_ratio
    return peak * (minimum + (1.0 - minimum) * _height(step, total_steps, settings))


def _height(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """Where the rate stands between the minimum (0) and the peak (1), after the warm-up."""
    remaining = max(total_steps - step, 0)
    falling = max(total_steps - settings.warmup_steps, 1)
    match settings.name:
        case "constant":
            return 1.0
        case "linear":
            return remaining / falling
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * remaining / falling))
        case "wsd":
            assert settings.decay_steps is not None
            return min(remaining / settings.decay_steps, 1.0)
