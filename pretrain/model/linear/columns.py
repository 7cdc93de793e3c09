"""What the column-sparse layers share: which input features a layer keeps, and the product with their columns alone."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.initialize import Draw

Norm = Literal["l2", "l1"]


def column_count(fraction: float, in_features: int) -> int:
    """max(1, ⌊δ n⌋), of the decimal number that ``fraction`` is written as."""
    return max(1, floor(Fraction(str(fraction)) * in_features))


def norms(weight: Tensor, norm: Norm) -> Tensor:
    """The norm of each column of ``weight`` [m, n]: [n]."""
    scores: Tensor = torch.linalg.vector_norm(weight, ord=2 if norm == "l2" else 1, dim=0)
    return scores


def largest(scores: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest of ``scores`` [n], ascending, int64; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def random_columns(draw: Draw, in_features: int, count: int) -> Tensor:
    """``count`` places below ``in_features``, ascending, int64, drawn without replacement."""
    return largest(draw("columns", (in_features,), 1.0), count)


def column_product(x: Tensor, columns: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """``scale`` x[..., I] Wᵀ with x [..., n], I = ``columns`` [k] and W [m, k]: [..., m].

    The inputs are gathered, so that the product is a dense one of k columns.
    """
    gathered = x.index_select(-1, columns)
    return F.linear(gathered * scale if scale != 1.0 else gathered, weight)
