"""Parameter groups, the optimizers and the learning-rate schedule."""

from .base import OptimizerSettings
from .groups import parameter_groups
from .kinds.adamw import AdamWSettings
from .matrix_wise import MatrixWise
from .schedule import check_schedule, learning_rate
from .settings import Optimizer, ScheduleSettings

__all__ = [
    "AdamWSettings",
    "MatrixWise",
    "Optimizer",
    "OptimizerSettings",
    "ScheduleSettings",
    "check_schedule",
    "learning_rate",
    "parameter_groups",
]
