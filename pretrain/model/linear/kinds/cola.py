"""CoLA (Liu et al. 2025, arXiv 2502.10940): two factors with a non-linearity between them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from pretrain.model.initialize import Draw

from ..base import LinearCost
from ..factors import ActivationName, FactorLinear, FactorSettings, factor_cost
from ..terms import Term


class ColaLinear(FactorLinear):
    """y = B f(A x), both factors N(0, s²) at the start, s = r^{-1/4} (n + m)^{-1/4} of n inputs and m outputs.

    That is the authors' initialisation; ``model.init_std`` and ``model.init_scaled_residual`` have no part in it.
    """

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        std = (self.rank * (self.in_features + self.out_features)) ** -0.25
        return {
            "a": draw("a", (self.rank, self.in_features), std),
            "b": draw("b", (self.out_features, self.rank), std),
        }


class ColaSettings(FactorSettings):
    """y = B f(A x)."""

    kind: Literal["cola"] = "cola"
    activation: ActivationName = "silu"
    """f, between the factors; the authors' is SiLU."""

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        return ColaLinear(in_features, out_features, self.rank, self.activation)

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        return factor_cost(in_features, out_features, self.rank, self.activation)

    def terms(self) -> tuple[Term, ...]:
        return (Term("b", down="a", activation=self.activation),)
