"""The ``optimizer`` and ``schedule`` sections of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from pretrain.methods import choice_of

from .base import OptimizerSettings

if TYPE_CHECKING:
    Optimizer = OptimizerSettings
else:
    Optimizer = choice_of("pretrain.optimizer.kinds", OptimizerSettings, default="adamw")


class ScheduleSettings(Settings):
    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: ``cosine`` and ``linear`` fall to the minimum over the rest of the run; ``wsd`` stays at the
    peak and falls linearly in the last ``decay_steps``; ``constant`` stays at the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the linear rise from 0; the last of them has the peak learning rate."""
    minimum_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    """Learning rate at the end of the run, as a share of the peak; ``null``: 0.1. Not for ``constant``."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the fall at the end of the run; needed by ``wsd``, for it alone."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleSettings:
        if self.name == "wsd" and self.decay_steps is None:
            raise ValueError("name wsd needs decay_steps, the number of optimizer steps of the fall at the end")
        if self.name != "wsd" and self.decay_steps is not None:
            raise ValueError(f"decay_steps {self.decay_steps} belongs to name wsd; with {self.name} leave it out")
        if self.name == "constant" and self.minimum_ratio is not None:
            raise ValueError(f"minimum_ratio {self.minimum_ratio} has no meaning with name constant; leave it out")
        return self
