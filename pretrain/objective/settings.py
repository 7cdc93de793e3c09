"""Configuration of the objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings


class ReweightingSettings(Settings):
    """Loss-based sample reweighting (Sow et al., ICLR 2025, arXiv 2502.06733)."""

    strategy: Literal["uniform", "linupper"] = "uniform"
    """``uniform``: every sample weighs the same. ``linupper``: samples of low loss weigh less, those above the middle
    of the group's loss range all weigh the same. The group is one micro-step over all ranks (the paper's code)."""
    temperature: float = Field(default=1.0, gt=0)
    """r of the paper: the largest weight over the smallest is exp(1/r); ``.inf`` is exactly uniform."""
    start_step: int = Field(default=0, ge=0)
    """Optimizer steps at the beginning that weigh uniformly (the paper's code: 1000)."""

    @model_validator(mode="after")
    def _check(self) -> ReweightingSettings:
        given = sorted(self.model_fields_set - {"strategy"})
        if self.strategy == "uniform" and any(getattr(self, name) != _DEFAULTS[name] for name in given):
            raise ValueError(f"{' and '.join(given)} has no meaning with strategy uniform; leave it out")
        return self


_DEFAULTS = {name: field.default for name, field in ReweightingSettings.model_fields.items()}


class ObjectiveSettings(Settings):
    average: Literal["token", "sequence"] = "token"
    """What has weight one in the mean: every token, or every sequence's own token mean (the paper's form). They are the
    same where all sequences have the same number of labels."""
    z_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Coefficient of the mean squared log-partition of the output logits (PaLM); 0 is off."""
    reweighting: ReweightingSettings = ReweightingSettings()
