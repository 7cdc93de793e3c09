"""Focal-style weights: what the model already gives a high probability counts less."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import ProbabilitySettings


class FocalSettings(ProbabilitySettings):
    """Importance (1 - p)^gamma (KaLM-Embedding-V2, arXiv 2506.20923; the focal loss of arXiv 1708.02002).

    KaLM's gamma is known at second hand; the form of its weight and whether it is differentiated are unconfirmed. Here
    the weights are normalised as every strategy's are.
    """

    kind: Literal["focal"] = "focal"
    gamma: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """How fast the importance falls with p; 0 is exactly uniform."""
    differentiate: bool = False
    """Differentiate the importance too: l is then weighed by the derivative of (1 - p)^gamma l, which is (1 - p)^gamma
    (1 + gamma l p / (1 - p)), never negative and finite at p = 1 for every gamma."""

    @property
    def neutral(self) -> bool:
        return self.gamma == 0

    def log_importances(self, losses: Tensor, lowest: Tensor, highest: Tensor, temperature: float) -> Tensor:
        losses = losses.clamp(min=torch.finfo(losses.dtype).tiny)  # rounding may leave a loss at 0 or just below
        logs = self.gamma * (-losses).expm1().neg().log()
        if self.differentiate:
            logs = logs + (self.gamma * losses / losses.expm1()).log1p()
        return logs
