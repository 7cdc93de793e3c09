"""SLTrain: a low-rank weight plus a sparse one with fixed random positions (Han et al. 2024, arXiv 2406.02214)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.model.initialize import Draw

from ..base import LinearCost
from ..factors import FactorSettings
from ..terms import Term


class SLTrainLinear(nn.Module):
    """y = x Wᵀ with W = (α/r) B A + S: x [..., n], A [r, n], B [m, r], S [m, n] with few entries; no bias.

    At first A is uniform in ±1/√n (Kaiming with a = √5), B is 0 and the entries of S are uniform in ±1/√n; ``init_std``
    has no part in it. S is kept as its values and their positions in the flattened [m, n], which are ascending, every
    set of them equally likely, and never change.

    W is made for the time of a product, in the forward pass and again in the backward pass, and so is its gradient,
    of which those of A, B and the values are taken: one matrix [m, n] at a time, none kept. It is the authors' way.
    Thin products and a sparse one would make no such matrix, but torch has no sparse product in bf16 on CPUs and none
    in bf16 anywhere for the gradient of the values; in fp32 on a CPU they took 0.9 to 1.5 times as long as a dense
    layer at 4,096 tokens, this way 1.0 to 1.1 times.
    """

    positions: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, entries: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.entries = in_features, out_features, rank, entries
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.empty(out_features, rank))
        self.values = nn.Parameter(torch.empty(entries))
        dtype = _position_type(in_features * out_features)
        self.register_buffer("positions", torch.empty(entries, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        tensors = x, self.a, self.b, self.values, self.positions
        y: Tensor = _Product.apply(*tensors, self.scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return y

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        size, bound = self.in_features * self.out_features, 1 / math.sqrt(self.in_features)

        def uniform(name: str, *shape: int) -> Tensor:
            return torch.from_numpy(draw.generator(name).uniform(-bound, bound, shape)).float()

        positions = draw.generator("positions").choice(size, self.entries, replace=False, shuffle=False)
        return {
            "a": uniform("a", self.rank, self.in_features),
            "b": torch.zeros(self.out_features, self.rank),
            "values": uniform("values", self.entries),
            "positions": torch.from_numpy(positions).sort().values.to(_position_type(size)),
        }


def _position_type(size: int) -> torch.dtype:
    """Half the memory where it is enough."""
    return torch.int32 if size <= torch.iinfo(torch.int32).max else torch.int64


def _weight(a: Tensor, b: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """(α/r) B A + S [m, n]."""
    weight = b.mm(a * scale)
    weight.view(-1).index_add_(0, positions, values)
    return weight


class _Product(torch.autograd.Function):
    """x Wᵀ; keeps x and what W is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, values, positions)
        ctx.scale = scale
        return x.matmul(_weight(a, b, values, positions, scale).t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values, positions = ctx.saved_tensors
        (gradient,) = gradients
        of_x = gradient.matmul(_weight(a, b, values, positions, ctx.scale))
        of_weight = gradient.flatten(0, -2).t().mm(x.flatten(0, -2))
        of_values = of_weight.view(-1).index_select(0, positions)
        return of_x, b.t().mm(of_weight) * ctx.scale, of_weight.mm(a.t()) * ctx.scale, of_values, None, None


class SLTrainSettings(FactorSettings):
    """W = (α/r) B A + S. The papers' learning rate is 3e-3 without weight decay."""

    kind: Literal["sltrain"] = "sltrain"
    alpha: float = Field(gt=0.0, allow_inf_nan=False)
    """The low-rank part is multiplied by alpha / rank. The papers' models of 60M, 130M, 350M, 1B and 7B parameters
    have 32, 16, 16, 8 and 8."""
    nonzero_fraction: float = Field(default=0.03, gt=0.0, le=1.0)
    """Share of the entries that the sparse part has (δ); the papers' is 0.03, for 7B 0.05."""

    def entries(self, in_features: int, out_features: int) -> int:
        """⌊δ m n⌋, of the decimal number that ``nonzero_fraction`` is written as."""
        return math.floor(Fraction(str(self.nonzero_fraction)) * in_features * out_features)

    def check(self, in_features: int, out_features: int) -> None:
        super().check(in_features, out_features)
        if not self.entries(in_features, out_features):
            raise ValueError(
                f"nonzero_fraction {self.nonzero_fraction} leaves the sparse part no entry; give at least "
                f"{1 / (in_features * out_features):.2g}, or kind low_rank"
            )

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        entries = self.entries(in_features, out_features)
        return SLTrainLinear(in_features, out_features, self.rank, self.alpha / self.rank, entries)

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        entries, whole = self.entries(in_features, out_features), in_features * out_features
        # making W costs r m n more for each pass, whatever the number of tokens: little, where they are thousands
        parameters = self.rank * (in_features + out_features) + entries
        return LinearCost(parameters, whole, 0, buffer_bytes=entries * _position_type(whole).itemsize)

    def terms(self) -> tuple[Term, ...]:
        return Term("b", down="a", scale=self.alpha / self.rank), Term("values", places="positions")
