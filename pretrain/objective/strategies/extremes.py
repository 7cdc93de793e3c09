"""Extremes: both ends of the loss range."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..base import StrategySettings


class ExtremesSettings(StrategySettings):
    """Samples at both ends of the loss range weigh the most, those in its middle the least (Sow et al.)."""

    kind: Literal["extremes"] = "extremes"

    def score(self, h: Tensor) -> Tensor:
        return h.abs()
