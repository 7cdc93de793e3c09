"""LinUpper, the strategy that the paper recommends."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..base import StrategySettings


class LinUpperSettings(StrategySettings):
    """Samples of low loss weigh less; those above the middle of the loss range all weigh the same (Sow et al.)."""

    kind: Literal["linupper"] = "linupper"

    def score(self, h: Tensor) -> Tensor:
        return (h + 1.0).clamp(max=1.0)
