"""Column-sparse: a layer that sees a fixed part of its input features; LOST's sparse part alone."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.model.initialize import Draw

from ..base import LinearCost, LinearSettings
from ..columns import Norm, column_count, column_product, largest, norms, random_columns
from ..terms import Term


class ColumnSparseLinear(nn.Module):
    """y = x[..., I] W_sᵀ with W_s = W[:, I] of the dense weight W that the layer would start with; I is a buffer."""

    columns: Tensor

    def __init__(self, in_features: int, out_features: int, settings: ColumnSparseSettings, init_std: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.init_std = in_features, out_features, init_std
        self.chosen_by, self.norm = settings.columns, settings.norm
        self.count = column_count(settings.column_fraction, in_features)
        self.column_weight = nn.Parameter(torch.empty(out_features, self.count))
        self.register_buffer("columns", torch.empty(self.count, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return column_product(x, self.columns, self.column_weight)

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        weight = draw("weight", (self.out_features, self.in_features), self.init_std)
        if self.chosen_by == "random":
            columns = random_columns(draw, self.in_features, self.count)
        else:
            columns = largest(norms(weight.double(), self.norm), self.count)
        return {"column_weight": weight[:, columns], "columns": columns}


class ColumnSparseSettings(LinearSettings):
    """A part of the columns of the weight, chosen at the start and then fixed; the others are not there."""

    kind: Literal["column_sparse"] = "column_sparse"
    column_fraction: float = Field(gt=0.0, le=1.0)
    """Share of the columns, that is of the input features, that are kept (δ): ⌊δ n⌋, at least one."""
    columns: Literal["random", "norm"] = "random"
    """Which: drawn at random, or those of the largest norm in the initial weight."""
    norm: Norm = "l2"
    """Of a column, for ``columns: norm``."""

    @model_validator(mode="after")
    def _check(self) -> ColumnSparseSettings:
        if self.columns == "random" and self.norm != "l2":
            raise ValueError(f"norm {self.norm} has no meaning with columns random; leave it out")
        return self

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        return ColumnSparseLinear(in_features, out_features, self, init_std)

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        kept = column_count(self.column_fraction, in_features)
        weights = out_features * kept
        return LinearCost(weights, weights, activations=kept, buffer_bytes=8 * kept, keeps_input=False)

    def terms(self) -> tuple[Term, ...]:
        return (Term("column_weight", columns="columns"),)
