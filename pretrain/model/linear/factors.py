"""What the factorised layers share: y = f(x Aᵀ) Bᵀ with A [rank, in_features] and B [out_features, rank]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.model.recompute import first_product

from .base import LinearCost, LinearSettings

ActivationName = Literal["silu", "gelu", "relu", "identity"]


class Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]
    keeps_input: bool
    """Whether the backward pass needs the input besides the output."""


ACTIVATIONS: dict[ActivationName, Activation] = {
    "silu": Activation(F.silu, True),
    "gelu": Activation(F.gelu, True),
    "relu": Activation(F.relu, False),
    "identity": Activation(lambda values: values, False),
}


class FactorSettings(LinearSettings):
    """Base of the parameterizations with two factors."""

    rank: int = Field(ge=1)
    """Features between the two factors (r), at most the layer's smaller side. The papers' models of 60M, 130M, 350M,
    1B and 7B parameters have 128, 256, 256, 512 and 1024."""

    def check(self, in_features: int, out_features: int) -> None:
        smaller = min(in_features, out_features)
        if self.rank > smaller:
            raise ValueError(
                f"rank {self.rank} is above the smaller of its sides, {in_features} inputs and {out_features} outputs; "
                f"the largest rank it can have is {smaller}"
            )


class FactorLinear(nn.Module):
    """y = f(x Aᵀ) Bᵀ: x [..., in_features] -> [..., out_features], over r = ``rank`` features; no bias."""

    def __init__(self, in_features: int, out_features: int, rank: int, activation: ActivationName) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.activation = ACTIVATIONS[activation].function
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(first_product(x, self.a)), self.b)


def factor_cost(in_features: int, out_features: int, rank: int, activation: ActivationName) -> LinearCost:
    """Of a :class:`FactorLinear`."""
    weights = rank * (in_features + out_features)
    kept = 2 if ACTIVATIONS[activation].keeps_input else 1
    return LinearCost(parameters=weights, multiplied=weights, activations=kept * rank, products=rank)
