"""The plain linear layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from pretrain.model.initialize import Draw

from ..base import LinearCost, LinearSettings
from ..terms import DENSE, Term


class DenseLinear(nn.Linear):
    """y = x Wᵀ: x [..., in_features], W [out_features, in_features], no bias."""

    def __init__(self, in_features: int, out_features: int, init_std: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.init_std = init_std

    def reset_parameters(self) -> None:
        """Draws nothing: weights come from :mod:`pretrain.model.initialize`."""

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        return {"weight": draw("weight", (self.out_features, self.in_features), self.init_std)}


class DenseSettings(LinearSettings):
    """The whole weight: what every layer is that no rule names."""

    kind: Literal["dense"] = "dense"

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        return DenseLinear(in_features, out_features, init_std)

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        return LinearCost(in_features * out_features, in_features * out_features, 0)

    def terms(self) -> tuple[Term, ...]:
        return DENSE
