"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..base import AdamSettings


class AdamWSettings(AdamSettings):
    """Every parameter by torch's AdamW."""

    kind: Literal["adamw"] = "adamw"

    def mup_rate(self, shape: tuple[int, int], base: tuple[int, int]) -> float:
        """Adam moves every entry by about the rate, all in step with the inputs that they multiply: 1 / fan-in."""
        return base[1] / shape[1]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return self.adamw(groups)
