"""The SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import make_linear
from .settings import ModelSettings


class FeedForward(nn.Module):
    """y = W_down (SiLU(W_gate x) * W_up x): [..., d] -> [..., d]."""

    def __init__(self, name: str, settings: ModelSettings) -> None:
        super().__init__()
        hidden, intermediate = settings.hidden_size, settings.intermediate_size
        self.gate = make_linear(hidden, intermediate, f"{name}.gate", settings)
        self.up = make_linear(hidden, intermediate, f"{name}.up", settings)
        self.down = make_linear(intermediate, hidden, f"{name}.down", settings)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return output
