"""Plain low-rank: the weight is a product of two factors (the baseline "low-rank" of arXiv 2403.03507)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from pretrain.model.initialize import Draw

from ..base import LinearCost
from ..factors import FactorLinear, FactorSettings, factor_cost
from ..terms import Term


class LowRankLinear(FactorLinear):
    """y = x Aᵀ Bᵀ: the weight W = BA [out_features, in_features] has rank r and is never made.

    Both factors start as N(0, s²) with s = √σ r^{-1/4}: an entry of BA, the sum of r products, has the variance
    r s⁴ = σ², with σ the standard deviation of the dense layer's weight.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, init_std: float) -> None:
        super().__init__(in_features, out_features, rank, "identity")
        self.factor_std = init_std**0.5 * rank**-0.25

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        return {
            "a": draw("a", (self.rank, self.in_features), self.factor_std),
            "b": draw("b", (self.out_features, self.rank), self.factor_std),
        }


class LowRankSettings(FactorSettings):
    """W = BA, both factors Gaussian at the start."""

    kind: Literal["low_rank"] = "low_rank"

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        return LowRankLinear(in_features, out_features, self.rank, init_std)

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        return factor_cost(in_features, out_features, self.rank, "identity")

    def terms(self) -> tuple[Term, ...]:
        return (Term("b", down="a"),)
