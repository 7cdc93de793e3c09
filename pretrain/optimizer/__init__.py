"""Parameter groups, the optimizer and the learning-rate schedule."""

from .groups import build_optimizer, parameter_groups
from .schedule import check_schedule, learning_rate
from .settings import OptimizerSettings, ScheduleSettings

__all__ = [
    "OptimizerSettings",
    "ScheduleSettings",
    "build_optimizer",
    "check_schedule",
    "learning_rate",
    "parameter_groups",
]
