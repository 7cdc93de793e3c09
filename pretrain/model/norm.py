"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialize import Draw


class RMSNorm(nn.Module):
    """y = g x / sqrt(mean(x²) + eps) over the last dimension, [..., size]; computed in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.eps)

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        return {"weight": torch.ones(self.size)}
