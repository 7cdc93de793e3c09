"""Steps that would harm a run: told apart, left out, gone back from; bounded."""

from .judge import Action, Figures, Incident, Past, judge, without_checkpoint
from .settings import SpikeSettings, StabilitySettings

__all__ = [
    "Action",
    "Figures",
    "Incident",
    "Past",
    "SpikeSettings",
    "StabilitySettings",
    "judge",
    "without_checkpoint",
]
