"""The SwiGLU feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import make_linear
from .settings import ModelSettings


class FeedForward(nn.Module):
    """y = W_down (SiLU(W_gate x) * W_up x): [..., d] -> [..., d].

    Args:
        name: the module's full name.
        settings: of the model.
        intermediate: features inside; None: ``settings.intermediate_size``.
    """

    def __init__(self, name: str, settings: ModelSettings, intermediate: int | None = None) -> None:
        super().__init__()
        hidden, intermediate = settings.hidden_size, intermediate or settings.intermediate_size
        self.gate = make_linear(hidden, intermediate, f"{name}.gate", settings)
        self.up = make_linear(hidden, intermediate, f"{name}.up", settings)
        self.down = make_linear(intermediate, hidden, f"{name}.down", settings)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return output
