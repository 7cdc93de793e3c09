"""Quadratic: the middle of the loss range."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..base import StrategySettings


class QuadraticSettings(StrategySettings):
    """Samples in the middle of the loss range weigh the most, those at both ends the least (Sow et al.)."""

    kind: Literal["quadratic"] = "quadratic"

    def score(self, h: Tensor) -> Tensor:
        return 1.0 - h.square()
