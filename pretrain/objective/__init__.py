"""The objective: what an optimizer step minimises, over one denominator."""

from .objective import Objective, StepStatistics
from .settings import ObjectiveSettings, ReweightingSettings
from .terms import Term, engine_loss

__all__ = ["Objective", "ObjectiveSettings", "ReweightingSettings", "StepStatistics", "Term", "engine_loss"]
