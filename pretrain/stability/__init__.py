"""Steps that would harm a run: told apart, left out, gone back from; bounded."""

from .judge import Action, Figures, Incident, Past, judge, without_checkpoint
from .rerun import Computed, verdict
from .settings import SpikeSettings, StabilitySettings

__all__ = [
    "Action",
    "Computed",
    "Figures",
    "Incident",
    "Past",
    "SpikeSettings",
    "StabilitySettings",
    "judge",
    "verdict",
    "without_checkpoint",
]
