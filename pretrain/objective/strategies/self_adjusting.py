"""Self-adjusting weights of the Dice loss (Li et al., ACL 2020, arXiv 1911.02855)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..base import ProbabilitySettings


class SelfAdjustingSettings(ProbabilitySettings):
    """Samples weigh as in the self-adjusting Dice loss of their labels (y = 1), with u = (1 - p)^alpha p::

        1 - (2 u + smooth) / (u + 1 + smooth)

    (1 - p)^alpha is a weight, and not differentiated: through it the loss would be least at p = 1 / (1 + alpha), and
    train what is more probable away from 1.
    """

    kind: Literal["self_adjusting"] = "self_adjusting"
    alpha: float = Field(ge=0, allow_inf_nan=False)
    """How fast the weight (1 - p)^alpha falls. The authors' code has 0, which switches it off and leaves soft Dice."""
    form: Literal["instance", "set", "weight"] = "instance"
    """``instance``: the Dice loss of each sample by itself (the paper's); the importance is minus its derivative by
    log p, u (2 + smooth) / (u + 1 + smooth)^2. ``set``: one Dice loss of sums over the group (the authors' code for two
    classes); its derivatives are in proportion to u. ``weight``: (1 - p)^alpha alone, on the cross-entropy; with alpha
    0 exactly uniform."""
    smooth: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    """Added to numerator and denominator of the Dice loss; only ``instance`` depends on it."""

    @model_validator(mode="after")
    def _check(self) -> SelfAdjustingSettings:
        if self.form != "instance" and self.smooth != type(self).model_fields["smooth"].default:
            raise ValueError(
                f"smooth {self.smooth} has no meaning with form {self.form}, whose weights do not depend on it; leave "
                "it out, or set form=instance"
            )
        return self

    @property
    def neutral(self) -> bool:
        return self.form == "weight" and self.alpha == 0

    def log_importances(self, losses: Tensor, lowest: Tensor, highest: Tensor, temperature: float) -> Tensor:
        losses = losses.clamp(min=torch.finfo(losses.dtype).tiny)  # rounding may leave a loss at 0 or just below
        log_weights = self.alpha * (-losses).expm1().neg().log()
        if self.form == "weight":
            return log_weights
        logs = log_weights - losses
        if self.form == "instance":
            logs = logs + math.log(2.0 + self.smooth) - 2.0 * (logs.exp() + (1.0 + self.smooth)).log()
        return logs
