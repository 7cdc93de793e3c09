"""No reweighting."""

from __future__ import annotations

from typing import Literal

from ..base import StrategySettings


class UniformSettings(StrategySettings):
    """Every sample weighs the same; no loss is gathered."""

    kind: Literal["uniform"] = "uniform"

    @property
    def neutral(self) -> bool:
        return True
