"""The ``optimizer`` and ``schedule`` sections of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class OptimizerSettings(Settings):
    name: Literal["adamw"] = "adamw"
    """``adamw``: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    lr: float = Field(default=3e-4, gt=0.0, allow_inf_nan=False)
    """Peak learning rate: what the schedule reaches after its warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square, per step."""
    eps: float = Field(default=1e-8, gt=0.0, allow_inf_nan=False)
    """Added to the square root of the mean square gradient."""
    weight_decay: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Share of a decayed weight removed in each step, as a multiple of the learning rate."""
    decay_norms_and_embeddings: bool = False
    """Decay the norms' gains and the embedding (a tied head with it) too."""
    clip_norm: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """A gradient whose global norm is larger is scaled down to this norm; 0 never clips."""
    fused: bool = True
    """One kernel for the whole update, where the parameters' device has it (CPU and CUDA)."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must both be at least 0 and below 1")
        return self


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
