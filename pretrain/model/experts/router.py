"""The router: a linear layer in fp32 whose outputs say how much of a token each expert gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.initialize import Draw

from .noise import uniform
from .routing import Scores

if TYPE_CHECKING:
    from .settings import ExpertsSettings


class Router(nn.Module):
    """Logits x Wᵀ of the experts, x [b, T, d] and W [E, d] -> [b, T, E] fp32, whatever x is.

    Args:
        layer: the block's number, which the jitter depends on.
        settings: of the mixture.
        hidden_size: d.
        init_std: of W.
    """

    selection_bias: Tensor

    def __init__(self, layer: int, settings: ExpertsSettings, hidden_size: int, init_std: float) -> None:
        super().__init__()
        self.layer, self.hidden_size, self.init_std = layer, hidden_size, init_std
        self.number, self.score, self.jitter = settings.number, settings.score, settings.jitter
        self.weight = nn.Parameter(torch.empty(settings.number, hidden_size))
        self.has_bias = settings.selection_bias
        if self.has_bias:
            # by way of int32: while it builds a model, ZeRO-3 makes whatever torch.empty makes of floats bf16
            bias = torch.empty(settings.number, dtype=torch.int32).view(torch.float32)
            self.register_buffer("selection_bias", bias)

    def forward(self, x: Tensor, noise_keys: Tensor | None) -> Tensor:
        """``noise_keys`` [b] int64: see :func:`~.noise.noise_keys`; None: no jitter."""
        x = x.float()
        if self.jitter and noise_keys is not None:
            x = x * (1.0 + self.jitter * (2.0 * uniform(noise_keys, self.layer, *x.shape[1:]) - 1.0))
        return F.linear(x, self.weight.float())

    def scores(self, logits: Tensor) -> Scores:
        """What follows from the logits [b, T, E]."""
        if self.score == "softmax":
            scores = probabilities = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            probabilities = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        bias = self.selection_bias if self.has_bias else logits.new_zeros(())
        return Scores(logits, scores, probabilities, bias)

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        values = {"weight": draw("weight", (self.number, self.hidden_size), self.init_std)}
        return {**values, "selection_bias": torch.zeros(self.number)} if self.has_bias else values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        before = self.selection_bias if self.has_bias else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if before is not None and self.selection_bias.dtype != torch.float32:
            # a step of 1e-3 would be lost on it in bf16
            self.selection_bias = before.to(self.selection_bias.device)
        return self
