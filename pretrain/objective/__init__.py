"""The objective: what an optimizer step minimises, over one denominator."""

from .balancing.balancer import RoutingStatistics
from .base import LossSettings, ProbabilitySettings, StrategySettings
from .groups import Dropped, LossRange, StepWeights
from .objective import Objective, StepStatistics, scores_first
from .settings import ObjectiveSettings, ReweightingSettings
from .terms import Term, engine_loss

__all__ = [
    "Dropped",
    "LossRange",
    "LossSettings",
    "Objective",
    "ObjectiveSettings",
    "ProbabilitySettings",
    "ReweightingSettings",
    "RoutingStatistics",
    "StepStatistics",
    "StepWeights",
    "StrategySettings",
    "Term",
    "engine_loss",
    "scores_first",
]
