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
        """AdamW, fused where asked and where every parameter's device has the kernel."""
        for group in groups:
            # it is compared with the root of a mean square gradient
            group["eps"] = self.eps * group["gradient_scale"]
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        return torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True if self.fused and devices <= {"cpu", "cuda"} else None,
        )
