"""LOST (arXiv 2508.02668): a low-rank part from the singular vectors of a dense weight, and some of its columns.

The authors' code was not to be had. What is not known from the paper or from the first author's other code is a
setting, and its description says so.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.model.initialize import Draw
from pretrain.model.recompute import first_product

from ..base import LinearCost
from ..columns import Norm, column_count, column_product, largest, norms, random_columns
from ..factors import ACTIVATIONS, ActivationName, FactorSettings, factor_cost
from ..singular import Triplets, singular_triplets
from ..terms import Term


class LostLinear(nn.Module):
    """y = γ f(x Aᵀ) Bᵀ + (1 − γ) x[..., I] W_sᵀ: x [..., n] -> [..., m].

    With W = U Σ Vᵀ [m, n] the dense weight that the layer would start with, of which nothing is kept::

        A = Σ_r^½ V_rᵀ  [r, n],   B = U_r Σ_r^½  [m, r],   W_s = W[:, I]  [m, k]

    A, B and W_s are trained; I, the columns of the largest score in what the low-rank part leaves of W, is a buffer.
    With γ = 1 there is no sparse part, with γ = 0 no low-rank part: neither its parameters nor its work.
    """

    columns: Tensor

    def __init__(self, in_features: int, out_features: int, settings: LostSettings, init_std: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.init_std = in_features, out_features, init_std
        self.settings = settings
        self.gamma = settings.gamma
        self.activation = ACTIVATIONS[settings.activation].function
        if self.gamma > 0:
            self.a = nn.Parameter(torch.empty(settings.rank, in_features))
            self.b = nn.Parameter(torch.empty(out_features, settings.rank))
        if self.gamma < 1:
            self.count = column_count(settings.column_fraction, in_features)
            self.column_weight = nn.Parameter(torch.empty(out_features, self.count))
            self.register_buffer("columns", torch.empty(self.count, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma == 0:
            return column_product(x, self.columns, self.column_weight)
        inner = self.activation(first_product(x, self.a))
        if self.gamma == 1:
            return F.linear(inner, self.b)
        # γ and 1 − γ multiply the few inner features, not the outputs
        return F.linear(inner * self.gamma, self.b).add_(
            column_product(x, self.columns, self.column_weight, 1 - self.gamma)
        )

    def initial_values(self, draw: Draw) -> dict[str, Tensor]:
        weight = draw("weight", (self.out_features, self.in_features), self.init_std)
        values = {}
        leading = None
        if self.gamma > 0:
            leading = singular_triplets(weight.double(), 0, self.settings.rank)
            root = leading.sigma.sqrt()
            values = {"a": (leading.v * root).T.float(), "b": (leading.u * root).float()}
        if self.gamma < 1:
            if self.settings.columns == "random":
                columns = random_columns(draw, self.in_features, self.count)
            else:
                columns = largest(norms(self._scored(weight.double(), leading), self.settings.norm), self.count)
            values |= {"column_weight": weight[:, columns], "columns": columns}
        return values

    def _scored(self, weight: Tensor, leading: Triplets | None) -> Tensor:
        """Σ_l σ_l u_l v_lᵀ over the chosen residual singular values of ``weight``, float64 of its shape."""
        start, stop = self.settings.rank, min(weight.shape)
        if self.settings.residual == "all":
            return weight - (leading or singular_triplets(weight, 0, start)).product()
        count = self.settings.residual_count or 0
        if self.settings.residual == "next":
            stop = min(stop, start + count)
        else:
            start = max(start, stop - count)
        return singular_triplets(weight, start, stop).product()


class LostSettings(FactorSettings):
    """Low-rank plus column-sparse, both from the singular value decomposition of the initial dense weight."""

    kind: Literal["lost"] = "lost"
    gamma: float = Field(default=0.7, ge=0.0, le=1.0)
    """γ, the share of the low-rank part, 1 − γ that of the sparse part; not trained. The paper's is unconfirmed: 0.7 is
    from memory, the first author's code has 0.5, his example of use 0.25, an ablation 0.9. 1 leaves out the sparse
    part, 0 the low-rank part."""
    activation: ActivationName = "silu"
    """f, between the factors. The paper has one, which is unconfirmed; SiLU is CoLA's, and the first author's later
    code leaves it out (``identity``)."""
    column_fraction: float = Field(default=0.01, gt=0.0, le=1.0)
    """δ, share of the columns, that is of the input features, in the sparse part: ⌊δ n⌋, at least one. The paper's is
    unconfirmed: 0.01 is of the first author's example of use, his code's default is 0.05."""
    columns: Literal["score", "random"] = "score"
    """Which columns: those of the largest score, or, as an ablation, drawn at random."""
    residual: Literal["all", "next", "smallest"] = "all"
    """The singular values whose part of the weight is scored: all after the first ``rank``, as the paper's wording has
    it; the ``residual_count`` next ones, as the first author's code; or, as an option there, the smallest ones."""
    residual_count: int | None = Field(default=None, ge=1)
    """How many singular values ``residual: next`` and ``smallest`` take, or as many as are left; 256 in the first
    author's code."""
    norm: Norm = "l2"
    """The score of a column; the paper compares both."""

    @model_validator(mode="after")
    def _check_meaning(self) -> LostSettings:
        unused: tuple[str, ...] = ()
        reason = ""
        if self.gamma == 1:
            unused, reason = ("column_fraction", *_SCORING, "columns"), "gamma 1, which has no sparse part"
        elif self.columns == "random":
            unused, reason = _SCORING, "columns random"
        given = [name for name in unused if getattr(self, name) != LostSettings.model_fields[name].default]
        if given:
            raise ValueError(f"{' and '.join(given)} has no meaning with {reason}; leave it out")
        if self.gamma == 0 and self.activation != LostSettings.model_fields["activation"].default:
            raise ValueError("activation has no meaning with gamma 0, which has no low-rank part; leave it out")
        if self.residual == "all" and self.residual_count is not None:
            raise ValueError(f"residual_count {self.residual_count} has no meaning with residual all; leave it out")
        if self.residual != "all" and self.residual_count is None:
            raise ValueError(f"residual {self.residual} needs residual_count, the number of singular values")
        return self

    def check(self, in_features: int, out_features: int) -> None:
        super().check(in_features, out_features)
        if self.rank == min(in_features, out_features) and self.gamma < 1 and self.columns == "score":
            raise ValueError(
                f"rank {self.rank} is its smaller side, so that no singular value is left to score columns by; lower "
                "it by 1 or more, or set columns to random"
            )

    def make(self, in_features: int, out_features: int, init_std: float) -> nn.Module:
        return LostLinear(in_features, out_features, self, init_std)

    def cost(self, in_features: int, out_features: int) -> LinearCost:
        cost = LinearCost(0, 0, 0, keeps_input=False)
        if self.gamma > 0:
            cost = factor_cost(in_features, out_features, self.rank, self.activation)
        if self.gamma == 1:
            return cost
        columns = column_count(self.column_fraction, in_features)
        weights = cost.parameters + columns * out_features
        # what the factor B sees is scaled, so that it is not the activation's output that is kept of it
        scaled = self.rank if self.gamma > 0 and self.activation == "relu" else 0
        kept = cost.activations + columns + scaled
        return cost._replace(parameters=weights, multiplied=weights, activations=kept, buffer_bytes=8 * columns)

    def terms(self) -> tuple[Term, ...]:
        low_rank = Term("b", down="a", activation=self.activation, scale=self.gamma)
        sparse = Term("column_weight", columns="columns", scale=1 - self.gamma)
        return tuple(term for term in (low_rank, sparse) if term.scale)


_SCORING = ("residual", "residual_count", "norm")
"""Settings that only choosing columns by their score reads."""
